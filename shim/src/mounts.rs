//! The root file system of a container, as the contract's list of mounts.

use std::{
    io,
    path::{Path, PathBuf},
};

use holdfast_protos::shim::types::mount::Mount;
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
};

/// mount(2) takes a page of options.
const OPTIONS_MAX: usize = 4095;

/// Mounts each of `mounts` at `target` (or at its own place below it), in order. On an error what
/// was mounted is unmounted again.
pub(crate) fn mount_all(mounts: &[Mount], target: &Path) -> io::Result<()> {
    if mounts.is_empty() {
        return Ok(());
    }
    std::fs::create_dir_all(target)?;
    for one in mounts {
        if let Err(error) = mount_one(one, target) {
            let _ = unmount(target);
            let text = format!("mount {} {}: {error}", one.type_, one.source);
            return Err(io::Error::new(error.kind(), text));
        }
    }
    Ok(())
}

fn mount_one(one: &Mount, target: &Path) -> io::Result<()> {
    if one.type_.contains('/') {
        let message = "mounts that need a mount manager must be activated by the daemon";
        return Err(io::Error::new(io::ErrorKind::Unsupported, message));
    }
    if one.options.iter().any(|o| o.starts_with("uidmap=") || o.starts_with("gidmap=")) {
        let message = "this shim mounts no layers with mapped ids (options uidmap and gidmap): give pods in \
                       user namespaces to another runtime, or to holdfastd";
        return Err(io::Error::new(io::ErrorKind::Unsupported, message));
    }
    let place = if one.target.is_empty() { target.to_owned() } else { below(target, &one.target)? };
    let Options { flags, propagation, data } = Options::parse(&one.options);
    let bind = flags.contains(MsFlags::MS_BIND) || one.type_ == "bind";
    let first = if bind { (flags & MsFlags::MS_REC) | MsFlags::MS_BIND } else { flags };
    let kind = (!bind).then_some(one.type_.as_str());
    if data.len() > OPTIONS_MAX && one.type_ == "overlay" {
        mount_long_overlay(&one.source, &place, first, &data)?;
    } else {
        let data = (!data.is_empty()).then_some(data.as_str());
        mount(Some(one.source.as_str()), &place, kind, first, data)?;
    }
    let rest = flags & !(MsFlags::MS_BIND | MsFlags::MS_REC);
    if bind && !rest.is_empty() {
        // The flags of a bind mount take effect only when it is mounted again.
        let again = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | rest;
        mount(None::<&str>, &place, None::<&str>, again, None::<&str>)?;
    }
    if !propagation.is_empty() {
        mount(None::<&str>, &place, None::<&str>, propagation, None::<&str>)?;
    }
    Ok(())
}

/// A place inside the target, whatever the path says.
fn below(target: &Path, inside: &str) -> io::Result<PathBuf> {
    let mut place = target.to_owned();
    for part in Path::new(inside).components() {
        match part {
            std::path::Component::Normal(name) => place.push(name),
            std::path::Component::RootDir | std::path::Component::CurDir => {}
            _ => {
                let message = format!("mount target {inside:?} leaves the root file system");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            }
        }
    }
    Ok(place)
}

/// Layers by names relative to their common directory, so that they fit into a page.
fn mount_long_overlay(source: &str, place: &Path, flags: MsFlags, data: &str) -> io::Result<()> {
    let lower = data
        .split(',')
        .find_map(|option| option.strip_prefix("lowerdir="))
        .ok_or(io::ErrorKind::InvalidInput)?;
    let layers: Vec<&Path> = lower.split(':').map(Path::new).collect();
    let common = layers[0]
        .ancestors()
        .skip(1)
        .find(|dir| layers.iter().all(|layer| layer.starts_with(dir)))
        .unwrap_or(Path::new("/"));
    let short: Vec<_> = layers
        .iter()
        .map(|layer| layer.strip_prefix(common).unwrap_or(layer).to_string_lossy().into_owned())
        .collect();
    let short = data.replacen(lower, &short.join(":"), 1);
    if short.len() > OPTIONS_MAX {
        let message = format!("{} layers have too long names for one mount", layers.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    // One thread: nobody sees the working directory change.
    std::env::set_current_dir(common)?;
    let mounted = mount(Some(source), place, Some("overlay"), flags, Some(short.as_str()));
    std::env::set_current_dir("/")?;
    mounted.map_err(Into::into)
}

struct Options {
    flags: MsFlags,
    propagation: MsFlags,
    data: String,
}

impl Options {
    fn parse(options: &[String]) -> Self {
        let mut parsed =
            Self { flags: MsFlags::empty(), propagation: MsFlags::empty(), data: String::new() };
        for option in options {
            let (set, clear) = match option.as_str() {
                "defaults" | "rw" => (MsFlags::empty(), MsFlags::MS_RDONLY),
                "ro" => (MsFlags::MS_RDONLY, MsFlags::empty()),
                "bind" => (MsFlags::MS_BIND, MsFlags::empty()),
                "rbind" => (MsFlags::MS_BIND | MsFlags::MS_REC, MsFlags::empty()),
                "nosuid" => (MsFlags::MS_NOSUID, MsFlags::empty()),
                "suid" => (MsFlags::empty(), MsFlags::MS_NOSUID),
                "nodev" => (MsFlags::MS_NODEV, MsFlags::empty()),
                "dev" => (MsFlags::empty(), MsFlags::MS_NODEV),
                "noexec" => (MsFlags::MS_NOEXEC, MsFlags::empty()),
                "exec" => (MsFlags::empty(), MsFlags::MS_NOEXEC),
                "sync" => (MsFlags::MS_SYNCHRONOUS, MsFlags::empty()),
                "async" => (MsFlags::empty(), MsFlags::MS_SYNCHRONOUS),
                "dirsync" => (MsFlags::MS_DIRSYNC, MsFlags::empty()),
                "noatime" => (MsFlags::MS_NOATIME, MsFlags::empty()),
                "nodiratime" => (MsFlags::MS_NODIRATIME, MsFlags::empty()),
                "relatime" => (MsFlags::MS_RELATIME, MsFlags::empty()),
                "strictatime" => (MsFlags::MS_STRICTATIME, MsFlags::empty()),
                "private" | "rprivate" | "slave" | "rslave" | "shared" | "rshared"
                | "unbindable" | "runbindable" => {
                    parsed.propagation = propagation(option);
                    continue;
                }
                // Meant for a program, not for the kernel.
                x if x.starts_with("x-") || x.starts_with("X-") || x == "loop" => continue,
                other => {
                    if !parsed.data.is_empty() {
                        parsed.data.push(',');
                    }
                    parsed.data.push_str(other);
                    continue;
                }
            };
            parsed.flags.insert(set);
            parsed.flags.remove(clear);
        }
        parsed
    }
}

fn propagation(option: &str) -> MsFlags {
    let (kind, recursive) =
        option.strip_prefix('r').map_or((option, MsFlags::empty()), |kind| (kind, MsFlags::MS_REC));
    recursive
        | match kind {
            "slave" => MsFlags::MS_SLAVE,
            "shared" => MsFlags::MS_SHARED,
            "unbindable" => MsFlags::MS_UNBINDABLE,
            _ => MsFlags::MS_PRIVATE,
        }
}

/// Unmounts everything that is mounted at `target`; what is still in use is detached. Nothing
/// mounted, or no such place, is no error.
pub(crate) fn unmount(target: &Path) -> io::Result<()> {
    // Mounts can lie upon each other; the bound is against a mistake.
    for _ in 0..64 {
        match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(Errno::EBUSY) => {
                umount2(target, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH)?;
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(io::Error::other(format!("{} is mounted again and again", target.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_become_flags_and_data() {
        let options = ["ro", "nosuid", "rbind", "rslave", "lowerdir=/a:/b", "userxattr", "x-a=b"];
        let parsed = Options::parse(&options.map(str::to_owned));
        assert_eq!(
            parsed.flags,
            MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_BIND | MsFlags::MS_REC
        );
        assert_eq!(parsed.propagation, MsFlags::MS_SLAVE | MsFlags::MS_REC);
        assert_eq!(parsed.data, "lowerdir=/a:/b,userxattr");
    }

    #[test]
    fn layers_with_mapped_ids_are_refused_in_words() {
        let mut overlay = Mount::new();
        overlay.type_ = "overlay".into();
        overlay.source = "overlay".into();
        overlay.options = vec!["uidmap=0:100000:65536".into(), "lowerdir=/a:/b".into()];
        let error = mount_one(&overlay, Path::new("/r")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
        assert!(error.to_string().contains("uidmap"), "{error}");
    }

    #[test]
    fn a_target_stays_below_the_root_file_system() {
        let root = Path::new("/r");
        assert_eq!(below(root, "/etc/./x").unwrap(), Path::new("/r/etc/x"));
        assert!(below(root, "a/../../x").is_err());
    }
}
