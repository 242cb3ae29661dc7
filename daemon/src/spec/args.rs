//! What is run: arguments, environment, working directory, and the signal that stops it.

use super::Error;
use crate::pod::config::{ContainerConfig, ImageDefaults, User};

/// PATH of a container whose image and configuration have none.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// SIGRTMIN and SIGRTMAX as programs see them (glibc and musl keep the first ones to themselves).
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// The arguments, by Kubernetes' rules: a `command` replaces the image's entrypoint and with it its
/// cmd; `args` alone replace the cmd.
pub fn arguments(container: &ContainerConfig, image: &ImageDefaults) -> Result<Vec<String>, Error> {
    let (program, args) = match (&container.command[..], &container.args[..]) {
        ([], []) => (&image.entrypoint, &image.cmd),
        ([], _) => (&image.entrypoint, &container.args),
        (_, _) => (&container.command, &container.args),
    };
    let line: Vec<String> = program.iter().chain(args).cloned().collect();
    match line.first().map(String::as_str) {
        None => Err(Error::invalid(
            "command",
            "nothing to run: the image has no entrypoint or cmd, so the container must have a command",
        )),
        Some("") => Err(Error::invalid("command", "the program's name is empty")),
        Some(_) if line.iter().any(|word| word.contains('\0')) => {
            Err(Error::invalid("command", "an argument has a NUL byte"))
        }
        Some(_) => Ok(line),
    }
}

/// The environment: defaults, then the image's, then the container's; a later value takes the place
/// of an earlier one.
pub(super) fn environment(
    container: &ContainerConfig,
    image: &ImageDefaults,
    user: &User,
    hostname: &str,
) -> Result<Vec<String>, Error> {
    let mut env = Environment::default();
    env.set("PATH", PATH);
    env.set("HOSTNAME", hostname);
    if container.tty {
        env.set("TERM", "xterm");
    }
    if !user.home.is_empty() {
        env.set("HOME", &user.home);
    }
    for entry in &image.env {
        // An entry without "=" has no meaning in an environment: images are not refused for it.
        if let Some((name, value)) = entry.split_once('=').filter(|(name, _)| !name.is_empty()) {
            env.set(name, value);
        }
    }
    for (index, (name, value)) in container.env.iter().enumerate() {
        let refuse = |reason: String| Err(Error::invalid(format!("envs[{index}]"), reason));
        if name.is_empty() || name.contains(['=', '\0']) {
            return refuse(format!("{name:?} cannot be the name of a variable"));
        }
        if value.contains('\0') {
            return refuse(format!("the value of {name} has a NUL byte"));
        }
        env.set(name, value);
    }
    Ok(env.0.into_iter().map(|(name, value)| format!("{name}={value}")).collect())
}

/// Few enough for a search: order is kept, as people read it in `env`.
#[derive(Default)]
struct Environment(Vec<(String, String)>);

impl Environment {
    fn set(&mut self, name: &str, value: &str) {
        match self.0.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => value.clone_into(old),
            None => self.0.push((name.to_owned(), value.to_owned())),
        }
    }
}

/// The working directory: the container's, else the image's, else /.
pub(super) fn working_dir(
    container: &ContainerConfig,
    image: &ImageDefaults,
) -> Result<String, Error> {
    let ours = &container.working_dir;
    if !ours.is_empty() {
        if !ours.starts_with('/') || ours.contains('\0') {
            return Err(Error::invalid("working_dir", format!("{ours:?} is not an absolute path")));
        }
        return Ok(ours.clone());
    }
    // Builders write relative ones now and then, and mean "from the root".
    Ok(format!("/{}", image.working_dir.trim_start_matches('/')))
}

/// The signal that asks a container to stop: the container's, else the image's, else SIGTERM.
///
/// A container whose image names no signal we know is asked with SIGTERM: that must not be the
/// reason why it cannot be stopped. (The container's own was checked when it was made.)
pub fn stop_signal(container: &ContainerConfig, image: &ImageDefaults) -> i32 {
    [container.stop_signal.as_deref().unwrap_or(""), &image.stop_signal]
        .into_iter()
        .filter(|text| !text.trim().is_empty())
        .find_map(|text| parse_signal(text).ok())
        .unwrap_or(libc::SIGTERM)
}

/// A signal by name or number: "SIGTERM", "term", "15", "RTMIN+3", "SIGRTMINPLUS3", "SIGRTMAX-14".
pub fn parse_signal(text: &str) -> Result<i32, Error> {
    let unknown = || Error::invalid("stop_signal", format!("{text:?} is not a signal"));
    let upper = text.trim().to_ascii_uppercase();
    if let Ok(number) = upper.parse::<i32>() {
        let real = (1..=31).contains(&number) || (RTMIN..=RTMAX).contains(&number);
        return if real { Ok(number) } else { Err(unknown()) };
    }
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = SIGNALS.iter().find(|(known, _)| *known == name) {
        return Ok(*number);
    }
    let offset = |rest: &str, sign: &str, word: &str| -> Option<i32> {
        if rest.is_empty() {
            return Some(0);
        }
        let digits = rest.strip_prefix(sign).or_else(|| rest.strip_prefix(word))?;
        digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
    };
    let number = if let Some(rest) = name.strip_prefix("RTMIN") {
        offset(rest, "+", "PLUS").and_then(|n| RTMIN.checked_add(n))
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        offset(rest, "-", "MINUS").and_then(|n| RTMAX.checked_sub(n))
    } else {
        None
    };
    number.filter(|number| (RTMIN..=RTMAX).contains(number)).ok_or_else(unknown)
}

const SIGNALS: [(&str, i32); 34] = [
    ("HUP", libc::SIGHUP),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("ILL", libc::SIGILL),
    ("TRAP", libc::SIGTRAP),
    ("ABRT", libc::SIGABRT),
    ("IOT", libc::SIGIOT),
    ("BUS", libc::SIGBUS),
    ("FPE", libc::SIGFPE),
    ("KILL", libc::SIGKILL),
    ("USR1", libc::SIGUSR1),
    ("SEGV", libc::SIGSEGV),
    ("USR2", libc::SIGUSR2),
    ("PIPE", libc::SIGPIPE),
    ("ALRM", libc::SIGALRM),
    ("TERM", libc::SIGTERM),
    ("STKFLT", libc::SIGSTKFLT),
    ("CHLD", libc::SIGCHLD),
    ("CLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("STOP", libc::SIGSTOP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("URG", libc::SIGURG),
    ("XCPU", libc::SIGXCPU),
    ("XFSZ", libc::SIGXFSZ),
    ("VTALRM", libc::SIGVTALRM),
    ("PROF", libc::SIGPROF),
    ("WINCH", libc::SIGWINCH),
    ("IO", libc::SIGIO),
    ("POLL", libc::SIGIO),
    ("PWR", libc::SIGPWR),
    ("SYS", libc::SIGSYS),
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words(list: &[&str]) -> Vec<String> {
        list.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn command_and_args_by_kubernetes_rules() {
        let run = |command: &[&str], args: &[&str], entrypoint: &[&str], cmd: &[&str]| {
            let container = ContainerConfig {
                command: words(command),
                args: words(args),
                ..ContainerConfig::default()
            };
            let image = ImageDefaults {
                entrypoint: words(entrypoint),
                cmd: words(cmd),
                ..ImageDefaults::default()
            };
            arguments(&container, &image).map(|line| line.join(" "))
        };
        assert_eq!(run(&[], &[], &["e"], &["c"]).unwrap(), "e c");
        assert_eq!(run(&[], &["a"], &["e"], &["c"]).unwrap(), "e a");
        assert_eq!(run(&["p"], &[], &["e"], &["c"]).unwrap(), "p");
        assert_eq!(run(&["p"], &["a"], &["e"], &["c"]).unwrap(), "p a");
        assert_eq!(run(&[], &[], &[], &["c"]).unwrap(), "c");
        assert_eq!(run(&[], &["a"], &[], &["c"]).unwrap(), "a");
        for error in
            [run(&[], &[], &[], &[]), run(&[""], &[], &["e"], &[]), run(&["\0"], &[], &[], &[])]
        {
            assert!(error.unwrap_err().to_string().starts_with("command: "));
        }
    }

    fn env(image: &[&str], container: &[(&str, &str)], tty: bool) -> Result<Vec<String>, Error> {
        let container = ContainerConfig {
            env: container.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect(),
            tty,
            ..ContainerConfig::default()
        };
        let image = ImageDefaults { env: words(image), ..ImageDefaults::default() };
        let user = User { home: "/root".into(), ..User::default() };
        environment(&container, &image, &user, "h")
    }

    #[test]
    fn the_environment_is_merged_in_order() {
        let path = format!("PATH={PATH}");
        assert_eq!(env(&[], &[], false).unwrap(), [&path, "HOSTNAME=h", "HOME=/root"]);
        assert_eq!(
            env(
                &["PATH=/bin", "A=1", "B=x=y", "odd", "=odd", "E="],
                &[("A", "2"), ("HOME", "/h"), ("A", "3")],
                true
            )
            .unwrap(),
            ["PATH=/bin", "HOSTNAME=h", "TERM=xterm", "HOME=/h", "A=3", "B=x=y", "E="]
        );
        for bad in [("", "v"), ("a=b", "v"), ("a\0", "v"), ("a", "\0")] {
            let error = env(&[], &[("OK", ""), bad], false).unwrap_err().to_string();
            assert!(error.starts_with("envs[1]: "), "{error}");
        }
    }

    #[test]
    fn the_working_directory() {
        let dir = |ours: &str, image: &str| {
            let container =
                ContainerConfig { working_dir: ours.into(), ..ContainerConfig::default() };
            let image = ImageDefaults { working_dir: image.into(), ..ImageDefaults::default() };
            working_dir(&container, &image)
        };
        assert_eq!(dir("", "").unwrap(), "/");
        assert_eq!(dir("", "/srv").unwrap(), "/srv");
        assert_eq!(dir("", "srv").unwrap(), "/srv");
        assert_eq!(dir("/a", "/srv").unwrap(), "/a");
        assert!(dir("a", "/srv").is_err());
    }

    #[test]
    fn signals_in_every_form() {
        for (text, number) in [
            ("SIGTERM", 15),
            ("term", 15),
            ("15", 15),
            (" SIGKILL ", 9),
            ("SIGRTMIN", 34),
            ("RTMIN+3", 37),
            ("SIGRTMINPLUS15", 49),
            ("RTMAX", 64),
            ("SIGRTMAX-14", 50),
            ("SIGRTMAXMINUS1", 63),
            ("37", 37),
            ("SIGPOLL", 29),
        ] {
            assert_eq!(parse_signal(text).unwrap(), number, "{text}");
        }
        for bad in [
            "",
            "0",
            "32",
            "65",
            "-1",
            "SIG",
            "SIGNOPE",
            "RTMIN-1",
            "RTMIN+31",
            "RTMAX+1",
            "RTMIN++1",
            "RTMAX-99999999999",
        ] {
            assert!(parse_signal(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_stop_signal_is_the_containers_then_the_images_then_term() {
        let stop = |ours: Option<&str>, image: &str| {
            let container = ContainerConfig {
                stop_signal: ours.map(str::to_owned),
                ..ContainerConfig::default()
            };
            let image = ImageDefaults { stop_signal: image.into(), ..ImageDefaults::default() };
            stop_signal(&container, &image)
        };
        assert_eq!(stop(None, ""), 15);
        assert_eq!(stop(None, "SIGQUIT"), 3);
        assert_eq!(stop(Some("SIGUSR1"), "SIGQUIT"), 10);
        assert_eq!(stop(Some(""), "RTMIN+3"), 37);
        assert_eq!(stop(None, "NOPE"), 15);
    }

    proptest! {
        #[test]
        fn no_text_panics_and_every_signal_is_real(text: String) {
            if let Ok(number) = parse_signal(&text) {
                prop_assert!((1..=64).contains(&number) && number != 32 && number != 33);
            }
        }

        #[test]
        fn numbers_round_trip(number in 34i32..=64) {
            prop_assert_eq!(parse_signal(&format!("SIGRTMIN+{}", number - 34)).unwrap(), number);
            prop_assert_eq!(parse_signal(&format!("RTMAX-{}", 64 - number)).unwrap(), number);
        }

        #[test]
        fn a_name_is_there_once(vars in proptest::collection::vec(("[A-C]", "[a-z]{0,2}"), 0..8)) {
            let list: Vec<(&str, &str)> = vars.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
            let env = env(&["A=image"], &list, false).unwrap();
            let mut names: Vec<_> = env.iter().map(|e| e.split_once('=').unwrap().0).collect();
            names.sort_unstable();
            names.dedup();
            prop_assert_eq!(names.len(), env.len());
            for name in ["B", "C"] {
                let last = vars.iter().rfind(|(n, _)| n == name).map(|(n, v)| format!("{n}={v}"));
                prop_assert_eq!(env.iter().find(|e| e.starts_with(&format!("{name}="))), last.as_ref());
            }
        }
    }
}
