//! What is legal: the states of a pod and of a container, and the one function of each that changes
//! them. Pure: no clock, no I/O, no tokio.
//!
//! ```text
//! container   Creating ──Created──▶ Created ──Started──▶ Running ──Exited──▶ Exited
//!                                      └──Exited / NotStarted────────────────▲
//! pod         Starting ──Up──▶ Ready ──Down──▶ NotReady
//! ```
//!
//! `Creating` and `Starting` are intents: they are on disk before anything is made, and nobody sees
//! them in a list. A crash in them is undone at the next start.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// How a container's first process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// By `exit(2)`.
    Code(u8),
    /// By a signal.
    Signal(u8),
    /// The kernel's OOM killer struck in the container's cgroup. `status` is what a shell would say.
    OomKilled {
        /// 137 if the first process itself was killed.
        status: u8,
    },
    /// It never ran: the runtime refused.
    NotStarted {
        /// 127: the command was not found; 126: it cannot be executed; 128: anything else.
        code: u8,
        /// The runtime's own words.
        message: String,
    },
    /// Nobody knows: shim and record are both gone.
    Lost,
}

impl Exit {
    /// The exit code as a shell gives it. `Lost` has none; the CRI has no way to say so, and 255
    /// with the reason "Unknown" is what its users know.
    pub fn code(&self) -> i32 {
        match self {
            Exit::Code(code) => i32::from(*code),
            Exit::Signal(signal) => 128 + i32::from(*signal),
            Exit::OomKilled { status } => i32::from(*status),
            Exit::NotStarted { code, .. } => i32::from(*code),
            Exit::Lost => 255,
        }
    }

    /// From a wire status, which has signals folded in as 128 + n.
    pub fn from_status(status: u32, oom: bool) -> Self {
        let status = u8::try_from(status).unwrap_or(u8::MAX);
        match status {
            _ if oom => Exit::OomKilled { status },
            // Real-time signals end at 64 (signal(7)).
            129..=192 => Exit::Signal(status - 128),
            code => Exit::Code(code),
        }
    }

    /// One word for `ContainerStatus.reason`, as kubectl shows it.
    pub fn reason(&self) -> &'static str {
        match self {
            Exit::Code(0) => "Completed",
            Exit::Code(_) | Exit::Signal(_) => "Error",
            Exit::OomKilled { .. } => "OOMKilled",
            Exit::NotStarted { code: 126 | 127, .. } => "ContainerCannotRun",
            Exit::NotStarted { .. } => "StartError",
            Exit::Lost => "Unknown",
        }
    }
}

/// A container's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerState {
    /// Intended; being made.
    Creating,
    /// Made, not started.
    Created {
        /// Of its first process, which waits to execute the command; `None` for one that will be
        /// restored, and has no process before. On record: 0.
        #[serde(with = "pid_or_0")]
        pid: Option<u32>,
    },
    /// Running.
    Running {
        /// Of its first process.
        pid: u32,
        /// When.
        started_at: SystemTime,
    },
    /// Ended.
    Exited {
        /// `None`: it never ran.
        started_at: Option<SystemTime>,
        /// When.
        finished_at: SystemTime,
        /// How.
        how: Exit,
    },
}

/// What can happen to a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The runtime made it.
    Created {
        /// Of its first process, if it has one before it is started.
        pid: Option<u32>,
    },
    /// The command was executed, or the processes of a checkpoint were restored.
    Started {
        /// When.
        at: SystemTime,
        /// Of its first process.
        pid: u32,
    },
    /// Its first process ended, or starting it went wrong.
    Exited(End),
}

/// An end, as it is told or found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// When it had been started, where the record of its exit says so: it counts for a container whose
    /// start was asked for by a daemon that died before it knew.
    pub started_at: Option<SystemTime>,
    /// When it ended.
    pub at: SystemTime,
    /// How.
    pub how: Exit,
}

impl End {
    /// Of one that was not started, or by someone who knows of no start.
    pub fn new(at: SystemTime, how: Exit) -> Self {
        Self { started_at: None, at, how }
    }
}

/// A change that is not legal in a state.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a container that is {state} cannot become {change}")]
pub struct Refused {
    state: &'static str,
    change: &'static str,
}

impl ContainerState {
    /// The next state, or why the change is refused. The only writer of states.
    pub fn apply(self, change: Change) -> Result<Self, Refused> {
        let state = self.name();
        let refused = |change| Err(Refused { state, change });
        match (self, change) {
            (Self::Creating, Change::Created { pid }) => Ok(Self::Created { pid }),
            (Self::Created { pid: known }, Change::Started { at, pid }) => {
                Ok(Self::Running { pid: known.unwrap_or(pid), started_at: at })
            }
            (Self::Created { .. }, Change::Exited(End { started_at, at, how })) => {
                let finished_at = started_at.map_or(at, |started| at.max(started));
                Ok(Self::Exited { started_at, finished_at, how })
            }
            (Self::Running { started_at, .. }, Change::Exited(End { at, how, .. })) => {
                Ok(Self::Exited {
                    started_at: Some(started_at),
                    // A clock that was set back must not make a container end before it began.
                    finished_at: at.max(started_at),
                    how,
                })
            }
            // A short-lived process: its exit was told before our own call to start returned.
            (Self::Exited { started_at: None, finished_at, how }, Change::Started { at, .. }) => {
                Ok(Self::Exited { started_at: Some(at), finished_at: finished_at.max(at), how })
            }
            (Self::Creating, Change::Started { .. }) => refused("running"),
            (Self::Creating, Change::Exited(_)) => refused("exited"),
            (Self::Created { .. } | Self::Running { .. }, Change::Created { .. })
            | (Self::Exited { .. }, Change::Created { .. }) => refused("created"),
            (Self::Running { .. }, Change::Started { .. })
            | (Self::Exited { started_at: Some(_), .. }, Change::Started { .. }) => {
                refused("running")
            }
            // Seen twice, settled once.
            (Self::Exited { .. }, Change::Exited(_)) => refused("exited"),
        }
    }

    /// One word for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Created { .. } => "created",
            Self::Running { .. } => "running",
            Self::Exited { .. } => "exited",
        }
    }

    /// The first process, while there is one.
    pub fn pid(&self) -> Option<u32> {
        match self {
            Self::Created { pid } => *pid,
            Self::Running { pid, .. } => Some(*pid),
            Self::Creating | Self::Exited { .. } => None,
        }
    }

    /// Whether it has ended.
    pub fn is_exited(&self) -> bool {
        matches!(self, Self::Exited { .. })
    }
}

/// As daemons before this one wrote it: they know no container without a process.
mod pid_or_0 {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's form")]
    pub(super) fn serialize<S: Serializer>(pid: &Option<u32>, to: S) -> Result<S::Ok, S::Error> {
        pid.unwrap_or(0).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
        Ok(Some(u32::deserialize(from)?).filter(|pid| *pid != 0))
    }
}

/// A pod's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PodState {
    /// Intended; being made.
    Starting,
    /// Namespaces, network and shim are there.
    Ready,
    /// Stopped, or its shim died.
    NotReady,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn change() -> impl Strategy<Value = Change> {
        let at = |n: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(n);
        prop_oneof![
            (0..9u32).prop_map(|pid| Change::Created { pid: (pid != 0).then_some(pid) }),
            (0..9u64, 1..9u32).prop_map(move |(n, pid)| Change::Started { at: at(n), pid }),
            (prop::option::of(0..9u64), 0..9u64, any::<u8>()).prop_map(move |(began, n, code)| {
                let (started_at, how) = (began.map(at), Exit::Code(code));
                Change::Exited(End { started_at, at: at(n), how })
            }),
        ]
    }

    proptest! {
        /// The model: a rank that never falls, one pid for life, one exit for life, and an end that
        /// is never before the start.
        #[test]
        fn any_sequence_keeps_the_rules(changes in prop::collection::vec(change(), 0..20)) {
            let rank = |s: &ContainerState| match s {
                ContainerState::Creating => 0,
                ContainerState::Created { .. } => 1,
                ContainerState::Running { .. } => 2,
                ContainerState::Exited { .. } => 3,
            };
            let mut state = ContainerState::Creating;
            let (mut pid, mut exit) = (None, None);
            for change in changes {
                let before = state.clone();
                let next = state.clone().apply(change.clone());
                match &next {
                    Ok(next) => {
                        prop_assert!(rank(next) >= rank(&before));
                        prop_assert!(next != &before);
                        if let Some(now) = next.pid() {
                            prop_assert_eq!(*pid.get_or_insert(now), now);
                        }
                        if let ContainerState::Exited { started_at, finished_at, how } = next {
                            prop_assert_eq!(exit.get_or_insert(how.clone()), how);
                            prop_assert!(started_at.is_none_or(|s| s <= *finished_at));
                        }
                    }
                    Err(_) => prop_assert!(
                        !matches!((&before, &change), (ContainerState::Running { .. }, Change::Exited(_))),
                        "a running container's exit must be taken"
                    ),
                }
                state = next.unwrap_or(before);
            }
        }
    }

    #[test]
    fn an_exit_told_before_start_returned_keeps_its_start_time() {
        let at = |n| SystemTime::UNIX_EPOCH + Duration::from_secs(n);
        let state = ContainerState::Created { pid: Some(7) }
            .apply(Change::Exited(End::new(at(5), Exit::Code(3))))
            .and_then(|s| s.apply(Change::Started { at: at(4), pid: 7 }))
            .unwrap();
        assert_eq!(
            state,
            ContainerState::Exited {
                started_at: Some(at(4)),
                finished_at: at(5),
                how: Exit::Code(3)
            }
        );
    }

    #[test]
    fn an_exit_tells_of_a_start_that_nobody_heard_of() {
        let at = |n| SystemTime::UNIX_EPOCH + Duration::from_secs(n);
        let started_at = Some(at(4));
        let end = End { started_at, at: at(5), how: Exit::Code(3) };
        let state = ContainerState::Created { pid: Some(7) }.apply(Change::Exited(end)).unwrap();
        let expected =
            ContainerState::Exited { started_at, finished_at: at(5), how: Exit::Code(3) };
        assert_eq!(state, expected);
    }

    #[test]
    fn a_container_to_be_restored_gets_its_process_at_its_start() {
        let at = SystemTime::UNIX_EPOCH;
        let state = ContainerState::Creating.apply(Change::Created { pid: None }).unwrap();
        assert_eq!(state.pid(), None);
        let json = serde_json::to_string(&state).unwrap();
        assert_eq!(json, r#"{"Created":{"pid":0}}"#, "a daemon of before reads it");
        assert_eq!(serde_json::from_str::<ContainerState>(&json).unwrap(), state);
        let state = state.apply(Change::Started { at, pid: 9 }).unwrap();
        assert_eq!(state.pid(), Some(9));
    }

    #[test]
    fn statuses_become_exits() {
        assert_eq!(Exit::from_status(0, false), Exit::Code(0));
        assert_eq!(Exit::from_status(137, false), Exit::Signal(9));
        assert_eq!(Exit::from_status(137, true), Exit::OomKilled { status: 137 });
        assert_eq!(Exit::from_status(128, false), Exit::Code(128));
        assert_eq!(Exit::from_status(255, false), Exit::Code(255));
        for status in 0..=255 {
            assert_eq!(Exit::from_status(status, false).code(), status as i32);
        }
    }
}
