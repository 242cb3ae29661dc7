//! A piece of the machine that one test has for itself: a directory, and names made from it for what
//! does not live in directories. Everything on it can be found again by its name and is removed.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs::{self, File},
    io,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Once, OnceLock, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, umount2},
    sys::{
        prctl,
        signal::{Signal, kill, killpg},
    },
    unistd::{Pid, Uid, getpgid},
};

/// Short, for unix sockets have 107 bytes for their whole path.
const PREFIX: &str = "/tmp/hft-";
/// Locks that number subnets among the processes of this machine.
const SUBNETS: &str = "/run/lock/holdfast-test-subnets";

/// A directory `/tmp/hft-XXXXXXXX`, locked while this process uses it, with all that belongs to it.
#[derive(Debug)]
pub struct Ground {
    path: PathBuf,
    id: String,
    subnet: u16,
    _subnet_lock: Flock<File>,
    _lock: Flock<File>,
}

impl Ground {
    /// A new one. The first of a process sweeps those that killed processes have left.
    ///
    /// # Errors
    /// This process is not root, or the directory cannot be made.
    pub fn new() -> Result<Self> {
        ensure!(
            Uid::effective().is_root(),
            "these tests make mounts, namespaces and cgroups: run them as root ('sudo make test')"
        );
        static SWEPT: Once = Once::new();
        SWEPT.call_once(sweep_abandoned);

        let id = format!("{:08x}", rand::random::<u32>());
        let path = PathBuf::from(format!("{PREFIX}{id}"));
        // Locked before it has its name, so that nobody takes it for abandoned.
        let unnamed = PathBuf::from(format!("/tmp/.hft-{id}"));
        fs::create_dir(&unnamed).with_context(|| format!("make {}", unnamed.display()))?;
        let lock = lock(&unnamed.join("lock"))?.context("a new lock is taken")?;
        fs::rename(&unnamed, &path)?;
        let (subnet, subnet_lock) = subnet()?;
        Ok(Self { path, id, subnet, _subnet_lock: subnet_lock, _lock: lock })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Name of the cgroup that everything is under, in every hierarchy.
    pub fn cgroup(&self) -> String {
        format!("/hft-{}", self.id)
    }

    /// Name of the bridge.
    pub fn bridge(&self) -> String {
        format!("hft{}", self.id)
    }

    /// Name of the CNI network.
    pub fn network(&self) -> String {
        format!("hft-{}", self.id)
    }

    /// The IPv4 network: a /24 that no other ground has.
    pub fn subnet4(&self) -> String {
        format!("10.{}.{}.0/24", 192 + self.subnet / 256, self.subnet % 256)
    }

    /// The IPv6 network.
    pub fn subnet6(&self) -> String {
        format!("fd00:686f:6c64:{:x}::/64", self.subnet + 1)
    }

    /// Processes that belong to it: by command line, cgroup, working directory or root. Zombies do
    /// not count: they are their parent's matter.
    pub fn processes(&self) -> BTreeSet<i32> {
        processes(&self.path, &self.cgroup())
    }

    /// Mount points under the directory.
    pub fn mounts(&self) -> Vec<PathBuf> {
        mounts_under(&self.path)
    }

    /// Directories of cgroups that belong to it, children first, without the common parent.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        cgroup_mounts()
            .iter()
            .flat_map(|mount| descendants(&mount.join(self.cgroup().trim_start_matches('/'))))
            .collect()
    }

    /// Interfaces that are ports of the bridge.
    pub fn links(&self) -> Vec<String> {
        let ports = format!("/sys/class/net/{}/brif", self.bridge());
        names_in(Path::new(&ports))
    }

    /// Kills, unmounts and removes all that belongs to it.
    /// Ends all that a machine loses with its power: processes, mounts, cgroups, rules. Links go with their
    /// namespaces.
    ///
    /// # Errors
    /// Something stays.
    pub fn power_off(&self) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let processes = self.processes();
            if processes.is_empty() {
                break;
            }
            ensure!(Instant::now() < end, "processes do not die: {processes:?}");
            for pid in processes {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            thread::sleep(Duration::from_millis(20));
        }
        let mut mounts = self.mounts();
        mounts.sort();
        for mount in mounts.iter().rev() {
            let _ = umount2(mount, MntFlags::MNT_DETACH);
        }
        ensure!(self.mounts().is_empty(), "mounts stay: {:?}", self.mounts());
        for cgroup in self.cgroups() {
            let _ = fs::remove_dir(&cgroup);
        }
        remove_nat_rules(&self.network());
        Ok(())
    }

    fn sweep(&self) {
        sweep(&self.path, &self.id);
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        self.sweep();
    }
}

/// Removes what processes that were killed have left.
pub fn sweep_abandoned() {
    for entry in fs::read_dir("/tmp").into_iter().flatten().flatten() {
        let path = entry.path();
        let Some(id) = path.to_str().and_then(|path| path.strip_prefix(PREFIX)) else { continue };
        let Ok(file) = File::options().write(true).open(path.join("lock")) else {
            // Somebody is removing it just now. If that one was killed at its last step, it is empty.
            let _ = fs::remove_dir(&path);
            continue;
        };
        if let Ok(_lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            eprintln!("removing {}, which a killed test has left", path.display());
            sweep(&path, id);
        }
    }
}

fn sweep(path: &Path, id: &str) {
    let cgroup = format!("/hft-{id}");
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let processes = processes(path, &cgroup);
        if processes.is_empty() || Instant::now() > end {
            break;
        }
        for pid in processes {
            // With its children, where it leads a group of its own.
            let pid = Pid::from_raw(pid);
            if getpgid(Some(pid)) == Ok(pid) {
                let _ = killpg(pid, Signal::SIGKILL);
            }
            let _ = kill(pid, Signal::SIGKILL);
        }
        thread::sleep(Duration::from_millis(20));
    }
    for mount in mounts_under(path).iter().rev() {
        let _ = umount2(mount, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
    for mount in cgroup_mounts() {
        let top = mount.join(cgroup.trim_start_matches('/'));
        for dir in descendants(&top).iter().chain([&top]) {
            let _ = fs::remove_dir(dir);
        }
    }
    let bridge = format!("hft{id}");
    if Path::new("/sys/class/net").join(&bridge).exists() {
        let _ = Command::new("ip").args(["link", "delete", &bridge]).status();
    }
    remove_nat_rules(&format!("hft-{id}"));
    // The lock last: what has none looks abandoned.
    for name in names_in(path).iter().filter(|name| *name != "lock") {
        let entry = path.join(name);
        let removed =
            if is_dir(&entry) { fs::remove_dir_all(&entry) } else { fs::remove_file(&entry) };
        if let Err(error) = removed {
            eprintln!("{} cannot be removed: {error}", entry.display());
        }
    }
    let _ = fs::remove_file(path.join("lock"));
    let _ = fs::remove_dir(path);
}

fn is_dir(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir())
}

/// Removes what the bridge and portmap plugins wrote for a network. They name it in comments; the
/// chains that such rules jump to are the network's own.
fn remove_nat_rules(network: &str) {
    for iptables in ["iptables", "ip6tables"] {
        let call = |args: &[String]| {
            let _ = Command::new(iptables).args(["-w", "-t", "nat"]).args(args).status();
        };
        let mut chains = BTreeSet::new();
        for rule in nat_rules(iptables, network) {
            let mut words = split_quoted(&rule);
            let own = |target: &str| target.starts_with("CNI-") && target.len() > 20;
            let jumps = words.windows(2).filter(|pair| pair[0] == "-j" && own(&pair[1]));
            chains.extend(jumps.map(|pair| pair[1].clone()));
            words[0] = "-D".into();
            call(&words);
        }
        for chain in chains {
            call(&["-F".into(), chain.clone()]);
            call(&["-X".into(), chain]);
        }
    }
}

/// Rules of the nat table that name a CNI network.
pub fn nat_rules(iptables: &str, network: &str) -> Vec<String> {
    let Ok(output) = Command::new(iptables).args(["-w", "-t", "nat", "-S"]).output() else {
        return Vec::new();
    };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter(|line| line.starts_with("-A") && line.contains(&format!("\\\"{network}\\\"")))
        .map(String::from)
        .collect()
}

/// The words of a line of `iptables -S`: quoted ones have `\"` for a quote.
fn split_quoted(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    let mut letters = line.chars();
    while let Some(letter) = letters.next() {
        let word = words.last_mut().expect("one word at least");
        match letter {
            '\\' => word.extend(letters.next()),
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            other => word.push(other),
        }
    }
    words
}

fn subnet() -> Result<(u16, Flock<File>)> {
    fs::create_dir_all(SUBNETS)?;
    let start = rand::random::<u16>() % 4096;
    for step in 0..4096 {
        let number = (start + step) % 4096;
        if let Some(lock) = lock(&Path::new(SUBNETS).join(number.to_string()))? {
            return Ok((number, lock));
        }
    }
    bail!("all subnets for tests are in use: see {SUBNETS}")
}

/// The lock, unless another process has it.
fn lock(path: &Path) -> Result<Option<Flock<File>>> {
    let file = File::options().create(true).truncate(false).write(true).open(path)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error).with_context(|| format!("lock {}", path.display())),
    }
}

/// Mount points of every cgroup hierarchy.
pub fn cgroup_mounts() -> Vec<PathBuf> {
    mountinfo("/proc/self/mountinfo")
        .into_iter()
        .filter(|mount| mount.kind.starts_with("cgroup"))
        .map(|mount| mount.point)
        .collect()
}

/// A line of mountinfo, as far as it is of use here.
#[derive(Clone, Debug)]
pub struct Mount {
    /// Where it is.
    pub point: PathBuf,
    /// Type of the file system.
    pub kind: String,
    /// Options of the file system.
    pub options: String,
}

/// proc_pid_mountinfo(5)
pub fn mountinfo(path: &str) -> Vec<Mount> {
    fs::read_to_string(path)
        .unwrap_or_default()
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let mut right = right.split(' ');
            Some(Mount {
                point: left.split(' ').nth(4)?.replace("\\040", " ").into(),
                kind: right.next()?.into(),
                options: right.nth(1).unwrap_or_default().into(),
            })
        })
        .collect()
}

fn mounts_under(path: &Path) -> Vec<PathBuf> {
    mountinfo("/proc/self/mountinfo")
        .into_iter()
        .map(|mount| mount.point)
        .filter(|point| point.starts_with(path))
        .collect()
}

/// Directories below one, deepest first.
fn descendants(top: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![top.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.push(entry.path());
                open.push(entry.path());
            }
        }
    }
    found.sort_by_key(|dir| std::cmp::Reverse(dir.components().count()));
    found
}

/// Names in a directory, sorted; none when there is no such directory.
pub fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn processes(path: &Path, cgroup: &str) -> BTreeSet<i32> {
    let spared = [1, std::process::id() as i32];
    let text = path.to_string_lossy().into_owned();
    names_in(Path::new("/proc"))
        .iter()
        .filter_map(|name| name.parse().ok())
        .filter(|pid: &i32| {
            if spared.contains(pid) {
                return false;
            }
            let file = |name: &str| format!("/proc/{pid}/{name}");
            if is_zombie(*pid) {
                return false;
            }
            let holds = |name: &str, what: &str| {
                fs::read(file(name))
                    .is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(what))
            };
            holds("cmdline", &text)
                || holds("cgroup", &format!("{cgroup}/"))
                || fs::read_link(file("cwd")).is_ok_and(|cwd| cwd.starts_with(path))
                || root_is_under(*pid, &text)
        })
        .collect()
}

/// Whether the root of a process is an overlay of directories under `path`: it is in a container of
/// ours then. Other mounts say nothing: ours propagate into namespaces of others.
fn root_is_under(pid: i32, path: &str) -> bool {
    mountinfo(&format!("/proc/{pid}/mountinfo"))
        .iter()
        .any(|mount| mount.point == Path::new("/") && mount.options.contains(path))
}

/// Whether a process has ended and waits for its parent to notice; also when it is gone.
pub fn is_zombie(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        // The name, in parentheses, can hold anything.
        .and_then(|stat| stat.rsplit_once(") ").map(|(_, rest)| rest.starts_with(['Z', 'X'])))
        .unwrap_or(true)
}

/// A child process with its output in a file. It is killed when this is dropped, and by the kernel
/// when the test's process ends in whatever way.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
}

impl Process {
    /// Starts `program`, found in `PATH`; output is appended to the file `log`.
    ///
    /// # Errors
    /// The program or the file cannot be opened.
    pub fn spawn(
        program: impl AsRef<OsStr>,
        args: &[&OsStr],
        env: &[(String, String)],
        log: &Path,
    ) -> Result<Self> {
        let name = program.as_ref().to_string_lossy().into_owned();
        let output = File::options().create(true).append(true).open(log)?;
        let mut command = Command::new(program);
        command
            .args(args)
            .envs(env.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0);
        let child = spawn_with_parent(command).with_context(|| format!("run {name}"))?;
        Ok(Self { child, name })
    }

    /// Its id.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// waitpid(2) fails.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// It has ended already.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        ensure!(self.child.try_wait()?.is_none(), "{} has ended", self.name);
        Ok(kill(Pid::from_raw(self.pid()), signal)?)
    }

    /// SIGKILL, and waits for the end.
    ///
    /// # Errors
    /// waitpid(2) fails.
    pub fn kill9(&mut self) -> Result<()> {
        // Fails when it has ended already, which is as good.
        let _ = self.child.kill();
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM, and waits for the end; how it ended.
    ///
    /// # Errors
    /// It does not end within `limit`; it is killed then.
    pub fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        kill(Pid::from_raw(self.pid()), Signal::SIGTERM)?;
        let end = Instant::now() + limit;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(5));
        }
        self.kill9()?;
        bail!("{} did not end within {limit:?} of SIGTERM", self.name)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill9();
    }
}

/// Spawns from a thread that lives as long as this process, because the parent-death signal is about
/// the *thread* that made the child, and tests run in threads that come and go.
fn spawn_with_parent(command: Command) -> io::Result<Child> {
    type Job = (Command, mpsc::Sender<io::Result<Child>>);
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        thread::spawn(move || {
            for (mut command, reply) in jobs {
                die_with_parent(&mut command);
                let _ = reply.send(command.spawn());
            }
        });
        sender
    });
    let (reply, answer) = mpsc::channel();
    spawner.send((command, reply)).expect("the spawner never ends");
    answer.recv().expect("the spawner answers every job")
}

#[expect(unsafe_code, reason = "pre_exec runs code between fork and exec")]
fn die_with_parent(command: &mut Command) {
    // SAFETY: prctl(2) is async-signal-safe, and nothing is allocated.
    unsafe {
        command.pre_exec(|| prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_split_as_a_shell_would() {
        let rule = r#"-A POSTROUTING -s 10.1.2.3/32 -m comment --comment "name: \"hft-1\" id: \"abc\"" -j CNI-1"#;
        let words = split_quoted(rule);
        assert_eq!(words[6], "--comment");
        assert!(words.contains(&r#"name: "hft-1" id: "abc""#.to_owned()), "{words:?}");
        assert_eq!(words.last().unwrap(), "CNI-1");
    }
}
