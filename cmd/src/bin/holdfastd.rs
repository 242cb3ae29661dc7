//! `holdfastd`: the daemon.

fn main() -> std::process::ExitCode {
    holdfast_cmd::daemon::main()
}
