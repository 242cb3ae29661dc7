//! The namespaces of a pod: made by a helper, pinned by bind mounts, kept by nobody.
//!
//! ```text
//! shim --fork--> helper: [user namespace <- maps written by the shim]
//!                        net ipc uts [pid], host name, lo, sysctls, [pod init] --"ready"--> shim
//! shim: binds /proc/<helper>/ns/* to <bundle>/ns/*, lets the helper go
//! ```
//! `<bundle>/ns` is a private mount of its own, so that the pins do not spread to other mount
//! namespaces, where they would keep the pod's network alive after its end.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs,
    io::{self, Write as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::Arc,
    time::Duration,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use tokio::io::AsyncReadExt as _;

use crate::{
    bundle::{Bundle, Namespace},
    crash,
    options::{IdMap, PodOptions, UserMappings},
    process::{Owned, Reaper, check},
};

/// How long the kernel may take: making a network namespace waits for locks that others hold.
const DEADLINE: Duration = Duration::from_secs(60);

/// ioctl_nsfs(2).
const NS_GET_USERNS: libc::c_ulong = 0xb701;

/// Longest name that sethostname(2) takes.
const HOSTNAME_MAX: usize = 64;

/// Why a pod's namespaces could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// Asked for something that cannot be.
    #[error("{0}")]
    Invalid(String),
    /// The kernel refused.
    #[error("{what}: {message}")]
    Refused { what: &'static str, message: String },
    /// It took too long.
    #[error("namespaces are not made within {0:?}")]
    Deadline(Duration),
    /// A step of ours.
    #[error("{what}")]
    Io { what: &'static str, source: io::Error },
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { what, source }
}

/// What has been made.
pub(crate) struct Made {
    /// The pod's init: that of a shared PID namespace, or one that was asked for.
    pub(crate) init: Option<Owned>,
}

/// Refuses what can be seen to be wrong before anything is made.
pub(crate) fn validate(options: &PodOptions, netns: bool) -> Result<(), Error> {
    let invalid = |message: String| Err(Error::Invalid(message));
    if options.net && netns {
        return invalid("a pod has its own network namespace or a given one, not both".into());
    }
    if options.hostname.len() > HOSTNAME_MAX {
        return invalid(format!(
            "host name {:?} has {} bytes; Linux allows {HOSTNAME_MAX}",
            options.hostname,
            options.hostname.len()
        ));
    }
    if !options.hostname.is_empty() && !options.uts {
        return invalid("a host name needs a UTS namespace of the pod's own".into());
    }
    if let Some(user) = &options.user {
        for (kind, maps) in [("uid", &user.uids), ("gid", &user.gids)] {
            if maps.is_empty() || maps.iter().any(|map| map.length == 0) {
                return invalid(format!(
                    "the {kind} mappings of a user namespace must not be empty"
                ));
            }
            if !maps.iter().any(|map| map.container_id == 0) {
                return invalid(format!("the {kind} mappings of a user namespace must map 0"));
            }
        }
    }
    for name in options.sysctls.keys() {
        sysctl_path(name)?;
        let (net, ipc) = (
            name.starts_with("net.") || name.starts_with("net/"),
            ["kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue."]
                .iter()
                .any(|prefix| name.replace('/', ".").starts_with(prefix)),
        );
        let uts =
            matches!(name.replace('/', ".").as_str(), "kernel.hostname" | "kernel.domainname");
        if net && !(options.net || netns) {
            return invalid(format!(
                "sysctl {name} would change the node: the pod has no network of its own"
            ));
        }
        if ipc && !options.ipc {
            return invalid(format!(
                "sysctl {name} would change the node: the pod has no IPC of its own"
            ));
        }
        if uts && !options.uts {
            return invalid(format!(
                "sysctl {name} would change the node: the pod has no host name of its own"
            ));
        }
        if !(net || ipc || uts) {
            return invalid(format!(
                "sysctl {name} belongs to no namespace; it would change the node"
            ));
        }
    }
    Ok(())
}

/// The file of a sysctl. A name has dots, or slashes when a part of it has dots (sysctl(8)).
fn sysctl_path(name: &str) -> Result<String, Error> {
    let slashes = name.find('/').is_some_and(|slash| name.find('.').is_none_or(|dot| slash < dot));
    let path = if slashes {
        name.to_owned()
    } else {
        // Dots separate; a slash stands for a dot inside a part, as in eth0/100.
        name.chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect()
    };
    let plain = path.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
    if !plain || path.contains('\0') {
        return Err(Error::Invalid(format!("{name:?} is no name of a sysctl")));
    }
    Ok(format!("/proc/sys/{path}"))
}

/// Makes and pins what `options` ask for. On an error nothing is left.
pub(crate) async fn create(
    bundle: &Bundle,
    options: &PodOptions,
    netns: Option<&Path>,
    reaper: &Arc<Reaper>,
) -> Result<Made, Error> {
    let mut flags = CloneFlags::empty();
    flags.set(CloneFlags::CLONE_NEWNET, options.net);
    flags.set(CloneFlags::CLONE_NEWIPC, options.ipc);
    flags.set(CloneFlags::CLONE_NEWUTS, options.uts);
    flags.set(CloneFlags::CLONE_NEWPID, options.pid);
    if flags.is_empty() && options.user.is_none() && !options.init {
        return Ok(Made { init: None });
    }
    pin_directory(bundle).map_err(io_error("make the directory of namespaces"))?;
    crash::point("shim.sandbox.directory-made");
    let made = tokio::time::timeout(DEADLINE, run(bundle, options, flags, netns, reaper))
        .await
        .unwrap_or(Err(Error::Deadline(DEADLINE)));
    if made.is_err() {
        remove(bundle);
    }
    made
}

/// Unpins everything; the namespaces end with their last process. Nothing pinned is no error.
pub(crate) fn remove(bundle: &Bundle) {
    let dir = bundle.namespaces();
    for kind in Namespace::ALL {
        let pin = bundle.namespace(kind);
        while umount2(&pin, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
        let _ = fs::remove_file(&pin);
    }
    while umount2(&dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
    let _ = fs::remove_dir_all(&dir);
}

fn pin_directory(bundle: &Bundle) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    remove(bundle);
    let dir = bundle.namespaces();
    fs::DirBuilder::new().mode(0o700).create(&dir)?;
    mount(Some(&dir), &dir, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    mount(None::<&str>, &dir, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)?;
    Ok(())
}

async fn run(
    bundle: &Bundle,
    options: &PodOptions,
    flags: CloneFlags,
    netns: Option<&Path>,
    reaper: &Arc<Reaper>,
) -> Result<Made, Error> {
    let (ours, theirs) = UnixStream::pair().map_err(io_error("socketpair"))?;
    ours.set_nonblocking(true).map_err(io_error("socketpair"))?;
    // The pod's init becomes our child when the helper ends; its pid is known only then.
    let launch = reaper.launch();
    let helper = fork(&Plan { options, flags, netns }, theirs, reaper)?;
    let helper = Ended(helper);
    let mut wire = tokio::net::UnixStream::from_std(ours).map_err(io_error("socketpair"))?;

    if let Some(user) = options.user.as_ref().filter(|_| netns.is_none()) {
        expect(&mut wire, b'u').await?;
        map(helper.0.pid(), user).map_err(|error| {
            Error::Invalid(format!("the kernel refuses the id mappings: {error}"))
        })?;
        let answer = tokio::io::AsyncWriteExt::write_all(&mut wire, b"m").await;
        answer.map_err(io_error("tell the helper"))?;
    }
    expect(&mut wire, b'r').await?;
    let init = wire.read_u32().await.map_err(io_error("read from the helper"))?;
    let init = match init {
        0 => None,
        pid => Some(reaper.own(pid).map_err(io_error("open the pod's init"))?),
    };
    if let (Some(init), Some(cgroup)) = (&init, &options.cgroup) {
        let placed = place(init.pid(), cgroup);
        if let Err(error) = placed {
            let _ = init.signal(libc::SIGKILL);
            return Err(Error::Io { what: "put the pod's init into its cgroup", source: error });
        }
    }
    for (wanted, kind, source) in [
        (options.net, Namespace::Net, "net"),
        (options.ipc, Namespace::Ipc, "ipc"),
        (options.uts, Namespace::Uts, "uts"),
        (options.user.is_some(), Namespace::User, "user"),
        (options.pid, Namespace::Pid, "pid_for_children"),
    ] {
        if !wanted {
            continue;
        }
        let pinned = pin(helper.0.pid(), source, &bundle.namespace(kind));
        if let Err(source) = pinned {
            if let Some(init) = &init {
                let _ = init.signal(libc::SIGKILL);
            }
            return Err(Error::Io { what: "pin a namespace", source });
        }
        crash::point("shim.sandbox.namespace-pinned");
    }
    // The helper goes when it sees the end of the wire.
    drop(wire);
    let _ = helper.0.wait().await;
    drop(launch);
    Ok(Made { init })
}

/// The helper does not outlive a failure.
struct Ended(Owned);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.signal(libc::SIGKILL);
    }
}

fn pin(pid: u32, source: &str, place: &Path) -> io::Result<()> {
    fs::OpenOptions::new().write(true).create(true).truncate(false).open(place)?;
    let source = format!("/proc/{pid}/ns/{source}");
    mount(Some(source.as_str()), place, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(())
}

/// The leaf is a child of its own: version 2 allows no processes beside child cgroups.
pub(crate) const INIT_CGROUP: &str = "holdfast-init";

fn place(pid: u32, cgroup: &str) -> io::Result<()> {
    let parent = crate::cgroup::Cgroup::at(cgroup)?;
    if parent.is_empty() {
        let message = format!("there is no cgroup {cgroup}");
        return Err(io::Error::new(io::ErrorKind::NotFound, message));
    }
    parent.make_child(INIT_CGROUP)?.add(pid)
}

pub(crate) fn map(pid: u32, user: &UserMappings) -> io::Result<()> {
    let text = |maps: &[IdMap]| {
        maps.iter()
            .map(|map| format!("{} {} {}\n", map.container_id, map.host_id, map.length))
            .collect::<String>()
    };
    fs::write(format!("/proc/{pid}/uid_map"), text(&user.uids))?;
    fs::write(format!("/proc/{pid}/gid_map"), text(&user.gids))
}

/// Waits for a step of the helper: its letter, or `e` with what failed and why.
async fn expect(wire: &mut tokio::net::UnixStream, step: u8) -> Result<(), Error> {
    let letter = wire.read_u8().await.map_err(io_error("read from the helper"))?;
    if letter == step {
        return Ok(());
    }
    let mut text = String::new();
    wire.take(4096).read_to_string(&mut text).await.map_err(io_error("read from the helper"))?;
    Err(Error::Refused { what: "make namespaces", message: text })
}

struct Plan<'a> {
    options: &'a PodOptions,
    flags: CloneFlags,
    netns: Option<&'a Path>,
}

fn fork(plan: &Plan<'_>, wire: UnixStream, reaper: &Arc<Reaper>) -> Result<Owned, Error> {
    let pid = fork_helper(wire, |wire| helper(plan, wire)).map_err(io_error("fork"))?;
    reaper.own(pid).map_err(io_error("open the helper"))
}

/// Forks a helper that has nothing of ours but its end of a wire, and ends when its work does. The shim has one
/// thread, so its child may do anything a process may; but it leaves by `_exit`, for nothing of the
/// shim's is its own to drop. Gives its pid: it is the caller's to wait for.
#[expect(unsafe_code, reason = "fork(2), _exit(2)")]
pub(crate) fn fork_helper(
    wire: UnixStream,
    work: impl FnOnce(&UnixStream) -> io::Result<()>,
) -> io::Result<u32> {
    // SAFETY: there is no other thread whose locks the child could inherit.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            close_all_but(wire.as_raw_fd());
            let code = i32::from(work(&wire).is_err());
            // SAFETY: nothing is dropped and no handler runs.
            unsafe { libc::_exit(code) }
        }
        pid => Ok(pid.unsigned_abs()),
    }
}

/// Closes what the helper has of the shim's: its end of the wire, whose end would not be seen, and its
/// sockets, where a shim that has died would seem to answer for as long as the helper lives.
#[expect(unsafe_code, reason = "close_range(2)")]
fn close_all_but(kept: i32) {
    let kept = kept.unsigned_abs();
    for (first, last) in [(3, kept - 1), (kept + 1, libc::c_uint::MAX)] {
        if first <= last {
            // SAFETY: nothing in the child uses them: it leaves by `_exit`, without a drop.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
}

/// What the helper does, from fork to exit.
fn helper(plan: &Plan<'_>, mut wire: &UnixStream) -> io::Result<()> {
    let done = (|| {
        if let (Some(_), Some(netns)) = (&plan.options.user, plan.netns) {
            join_owner(netns)?;
            become_root()?;
        } else if plan.options.user.is_some() {
            unshare(CloneFlags::CLONE_NEWUSER).map_err(|e| format!("user namespace: {e}"))?;
            wire.write_all(b"u").map_err(|e| e.to_string())?;
            let mut answer = [0];
            io::Read::read_exact(&mut wire, &mut answer).map_err(|e| e.to_string())?;
            become_root()?;
        }
        unshare(plan.flags).map_err(|e| format!("namespaces: {e}"))?;
        set_up(plan)?;
        let init = plan.flags.contains(CloneFlags::CLONE_NEWPID) || plan.options.init;
        if init { start_init() } else { Ok(0) }
    })();
    match done {
        Ok(init) => {
            wire.write_all(b"r")?;
            wire.write_all(&init.to_be_bytes())?;
        }
        Err(message) => {
            wire.write_all(b"e")?;
            wire.write_all(message.as_bytes())?;
            return Ok(());
        }
    }
    // Until the shim has pinned what is ours.
    let _ = io::Read::read(&mut wire, &mut [0]);
    Ok(())
}

/// Enters the user namespace that a network namespace belongs to: whose root made it, and set it up.
#[expect(unsafe_code, reason = "ioctl(2) of a namespace")]
fn join_owner(netns: &Path) -> Result<(), String> {
    let name = netns.display();
    let given = fs::File::open(netns).map_err(|e| format!("{name}: {e}"))?;
    // SAFETY: ioctl_nsfs(2): no memory is involved; the descriptor is new and nobody else's.
    let owner = unsafe {
        let owner = check(libc::ioctl(given.as_raw_fd(), NS_GET_USERNS));
        OwnedFd::from_raw_fd(owner.map_err(|e| format!("the owner of {name}: {e}"))?)
    };
    nix::sched::setns(owner, CloneFlags::CLONE_NEWUSER).map_err(|errno| match errno {
        nix::errno::Errno::EINVAL => format!("{name} belongs to the node and to no user namespace"),
        errno => format!("enter the user namespace of {name}: {errno}"),
    })
}

/// Root of the user namespace, whom its namespaces and their sysctls belong to.
#[expect(unsafe_code, reason = "setresuid(2) of this one process")]
fn become_root() -> Result<(), String> {
    // SAFETY: no memory is involved.
    unsafe {
        check(libc::setresgid(0, 0, 0)).map_err(|e| format!("become root's group: {e}"))?;
        check(libc::setresuid(0, 0, 0)).map_err(|e| format!("become root: {e}"))?;
    }
    Ok(())
}

fn set_up(plan: &Plan<'_>) -> Result<(), String> {
    let options = plan.options;
    if options.net {
        loopback_up().map_err(|e| format!("bring up lo: {e}"))?;
    }
    if let Some(path) = plan.netns {
        // Only to set its sysctls; this process ends with it.
        let given = fs::File::open(path).map_err(|e| format!("{}: {e}", path.display()))?;
        nix::sched::setns(&given, CloneFlags::CLONE_NEWNET)
            .map_err(|e| format!("enter {}: {e}", path.display()))?;
    }
    if options.uts && !options.hostname.is_empty() {
        nix::unistd::sethostname(&options.hostname)
            .map_err(|e| format!("set host name {:?}: {e}", options.hostname))?;
    }
    set_sysctls(&options.sysctls)
}

fn set_sysctls(sysctls: &BTreeMap<String, String>) -> Result<(), String> {
    for (name, value) in sysctls {
        let path = sysctl_path(name).map_err(|e| e.to_string())?;
        fs::write(path, value).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => format!("sysctl {name}: this kernel has none of that name"),
            _ => format!("sysctl {name} = {value:?}: {error}"),
        })?;
    }
    Ok(())
}

#[expect(unsafe_code, reason = "ioctl(2) of a socket")]
fn loopback_up() -> io::Result<()> {
    // SAFETY: zero is a valid ifreq; the requests read and write that structure.
    unsafe {
        let fd = check(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0))?;
        let socket = OwnedFd::from_raw_fd(fd);
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request))?;
        request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request))?;
    }
    Ok(())
}

/// The pod's init, the first process of a new PID namespace if there is one: this binary, in its part as init.
#[expect(unsafe_code, reason = "fork(2) and exec in the helper")]
fn start_init() -> Result<u32, String> {
    let name = CString::new(crate::pod_init::NAME).map_err(|e| e.to_string())?;
    // SAFETY: one thread, and the child only execs or leaves.
    match unsafe { libc::fork() } {
        -1 => Err(format!("fork the pod's init: {}", io::Error::last_os_error())),
        0 => {
            let arguments = [name.as_ptr(), name.as_ptr(), std::ptr::null()];
            let environment = [std::ptr::null()];
            // SAFETY: both lists end with null and outlive the call.
            unsafe {
                libc::execve(c"/proc/self/exe".as_ptr(), arguments.as_ptr(), environment.as_ptr());
                libc::_exit(127)
            }
        }
        pid => Ok(pid.unsigned_abs()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(sysctl: &str) -> PodOptions {
        PodOptions {
            net: true,
            sysctls: [(sysctl.to_owned(), "1".to_owned())].into(),
            ..PodOptions::default()
        }
    }

    #[test]
    fn names_of_sysctls_become_paths_below_proc_sys() {
        let path = |name| sysctl_path(name).ok();
        assert_eq!(path("net.ipv4.ip_forward").as_deref(), Some("/proc/sys/net/ipv4/ip_forward"));
        assert_eq!(
            path("net/ipv4/conf/eth0.100/forwarding").as_deref(),
            Some("/proc/sys/net/ipv4/conf/eth0.100/forwarding")
        );
        assert_eq!(
            path("net.ipv4.conf.eth0/100.forwarding").as_deref(),
            Some("/proc/sys/net/ipv4/conf/eth0.100/forwarding")
        );
        for name in ["", ".", "net..x", "net/../../x", "/etc/passwd", "a/./b"] {
            assert_eq!(path(name), None, "{name}");
        }
    }

    #[test]
    fn a_sysctl_of_the_node_is_refused() {
        assert!(validate(&with("net.ipv4.ip_forward"), false).is_ok());
        for name in ["vm.swappiness", "kernel.shmmax", "kernel.hostname", "kernel.panic"] {
            let error = validate(&with(name), false).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("node"), "{error}");
        }
        let none = PodOptions { net: false, ..with("net.ipv4.ip_forward") };
        assert!(validate(&none, false).is_err());
        assert!(validate(&none, true).is_ok());
    }

    #[test]
    fn what_cannot_be_is_refused_before_anything_is_made() {
        let long = PodOptions { hostname: "a".repeat(65), uts: true, ..PodOptions::default() };
        assert!(validate(&long, false).unwrap_err().to_string().contains("64"));
        let hostless = PodOptions { hostname: "a".into(), ..PodOptions::default() };
        assert!(validate(&hostless, false).is_err());
        let both = PodOptions { net: true, ..PodOptions::default() };
        assert!(validate(&both, true).is_err());
        let empty = PodOptions { user: Some(UserMappings::default()), ..PodOptions::default() };
        assert!(validate(&empty, false).is_err());
    }
}
