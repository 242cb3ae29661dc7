//! `holdfast`: the command line.

fn main() -> std::process::ExitCode {
    holdfast_cmd::cli::main()
}
