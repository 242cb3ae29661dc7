//! What `/proc/PID/stat` says of a process (proc_pid_stat(5)).

/// Of one process, at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// It has ended, and nobody has reaped it.
    pub zombie: bool,
    /// Pid of its parent.
    pub parent: u32,
    /// Its session: the pid of who began it.
    pub session: u32,
    /// When it began, in clock ticks after the boot: with the pid it names a process for good.
    pub began: u64,
    /// As wait(2) tells it; of a [`Stat::zombie`].
    pub exit_code: i32,
}

/// Of the process that has this pid now.
pub fn stat_of(pid: u32) -> Option<Stat> {
    Stat::parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

impl Stat {
    fn parse(stat: &str) -> Option<Self> {
        // The name may hold anything, even what looks like its end.
        let mut fields = stat.rsplit_once(") ")?.1.split_whitespace();
        // Named by their numbers in the manual: the state, behind the name, is 3.
        let mut at = 2;
        let mut field = |number: usize| {
            let found = fields.nth(number - at - 1);
            at = number;
            found
        };
        Some(Self {
            zombie: matches!(field(3)?, "Z" | "X"),
            parent: field(4)?.parse().ok()?,
            session: field(6)?.parse().ok()?,
            began: field(22)?.parse().ok()?,
            exit_code: field(52)?.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_by_place_whatever_the_name_is() {
        let fields: Vec<String> = (3..=52).map(|number| number.to_string()).collect();
        let stat = format!("12 (a) S 1 2) Z {}\n", fields[1..].join(" "));
        let parsed = Stat { zombie: true, parent: 4, session: 6, began: 22, exit_code: 52 };
        assert_eq!(Stat::parse(&stat), Some(parsed));
        assert_eq!(Stat::parse("12 (a) R 1"), None);
        assert_eq!(Stat::parse("nonsense"), None);
    }

    #[test]
    fn our_own_is_understood() {
        let stat = stat_of(std::process::id()).unwrap();
        assert!(!stat.zombie && stat.began > 0);
        assert_eq!(stat.parent, std::os::unix::process::parent_id());
    }
}
