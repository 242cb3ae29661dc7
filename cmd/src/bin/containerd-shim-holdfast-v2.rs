//! The shim: one process per pod. All of it is in the library `holdfast-shim`.

fn main() -> std::process::ExitCode {
    holdfast_shim::command_line::main()
}
