//! The root file system of a container, as the contract's list of mounts.
//!
//! With the options `uidmap` and `gidmap` (`inside:outside:length`, several separated by commas; containerd
//! 2.x gives them for containers in user namespaces) what is mounted shows its owners as that namespace has
//! them: layers of an overlay, but not its writable one, whose files have the owners that the mount shows.

use std::{
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use holdfast_protos::shim::types::mount::Mount;
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
};

use crate::{
    mapped,
    options::{IdMap, UserMappings},
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
    let place = if one.target.is_empty() { target.to_owned() } else { below(target, &one.target)? };
    let options = Options::parse(&one.options)?;
    let Some(ids) = &options.ids else { return mount_as_it_is(one, &place, &options) };
    let users = mapped::user_namespace(ids)?;
    if one.type_ != "overlay" {
        mount_as_it_is(one, &place, &options)?;
        return mapped::again(&place, Some(users.as_fd()));
    }
    // The layers are seen with mapped owners where the overlay shall be, for as long as it takes to make
    // it there: it keeps what it is made of.
    let (common, layers) = layers(&options.data)?;
    mount(Some(common), &place, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    mapped::again(&place, Some(users.as_fd()))?;
    let lower: Vec<String> =
        layers.iter().map(|layer| place.join(layer).to_string_lossy().into_owned()).collect();
    let options = Options { data: with_layers(&options.data, &lower.join(":")), ..options };
    mount_as_it_is(one, &place, &options)?;
    mapped::again(&place, None)
}

fn mount_as_it_is(one: &Mount, place: &Path, options: &Options) -> io::Result<()> {
    let Options { flags, propagation, data, ids: _ } = options;
    let (flags, propagation) = (*flags, *propagation);
    let bind = flags.contains(MsFlags::MS_BIND) || one.type_ == "bind";
    let first = if bind { (flags & MsFlags::MS_REC) | MsFlags::MS_BIND } else { flags };
    let kind = (!bind).then_some(one.type_.as_str());
    if data.len() > OPTIONS_MAX && one.type_ == "overlay" {
        mount_long_overlay(&one.source, place, first, data)?;
    } else {
        let data = (!data.is_empty()).then_some(data.as_str());
        mount(Some(one.source.as_str()), place, kind, first, data)?;
    }
    let rest = flags & !(MsFlags::MS_BIND | MsFlags::MS_REC);
    if bind && !rest.is_empty() {
        // The flags of a bind mount take effect only when it is mounted again.
        let again = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | rest;
        mount(None::<&str>, place, None::<&str>, again, None::<&str>)?;
    }
    if !propagation.is_empty() {
        mount(None::<&str>, place, None::<&str>, propagation, None::<&str>)?;
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
                return Err(invalid(format!(
                    "mount target {inside:?} leaves the root file system"
                )));
            }
        }
    }
    Ok(place)
}

/// The directory that holds all layers of an overlay, and their places in it, from the top.
fn layers(data: &str) -> io::Result<(&Path, Vec<&Path>)> {
    let lower =
        lowerdir(data).ok_or_else(|| invalid("an overlay without the option lowerdir".into()))?;
    let layers: Vec<&Path> = lower.split(':').map(Path::new).collect();
    let common = layers[0]
        .ancestors()
        .skip(1)
        .find(|dir| layers.iter().all(|layer| layer.starts_with(dir)))
        .unwrap_or(Path::new("/"));
    let within = layers.iter().map(|layer| layer.strip_prefix(common).unwrap_or(layer)).collect();
    Ok((common, within))
}

fn lowerdir(data: &str) -> Option<&str> {
    data.split(',').find_map(|option| option.strip_prefix("lowerdir="))
}

fn with_layers(data: &str, lower: &str) -> String {
    data.split(',')
        .map(|option| match option.strip_prefix("lowerdir=") {
            Some(_) => format!("lowerdir={lower}"),
            None => option.to_owned(),
        })
        .collect::<Vec<_>>()
        .join(",")
}

/// Layers by names relative to their common directory, so that they fit into a page.
fn mount_long_overlay(source: &str, place: &Path, flags: MsFlags, data: &str) -> io::Result<()> {
    let (common, layers) = layers(data)?;
    let short: Vec<_> = layers.iter().map(|layer| layer.to_string_lossy()).collect();
    let short = with_layers(data, &short.join(":"));
    if short.len() > OPTIONS_MAX {
        return Err(invalid(format!("{} layers have too long names for one mount", layers.len())));
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
    /// Of a user namespace.
    ids: Option<UserMappings>,
}

impl Options {
    fn parse(options: &[String]) -> io::Result<Self> {
        let mut parsed = Self {
            flags: MsFlags::empty(),
            propagation: MsFlags::empty(),
            data: String::new(),
            ids: None,
        };
        let mut ids = UserMappings::default();
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
                map if map.starts_with("uidmap=") => {
                    ids.uids = parse_map(map)?;
                    continue;
                }
                map if map.starts_with("gidmap=") => {
                    ids.gids = parse_map(map)?;
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
        parsed.ids = match (ids.uids.is_empty(), ids.gids.is_empty()) {
            (true, true) => None,
            (false, false) => Some(ids),
            _ => return Err(invalid("the options uidmap and gidmap belong together".into())),
        };
        Ok(parsed)
    }
}

/// `uidmap=inside:outside:length,…`
fn parse_map(option: &str) -> io::Result<Vec<IdMap>> {
    let list = option.split_once('=').map_or("", |(_, list)| list);
    let one = |map: &str| {
        let mut numbers = map.split(':').map(|number| number.parse().ok());
        let (container_id, host_id, length) =
            (numbers.next()??, numbers.next()??, numbers.next()??);
        (numbers.next().is_none() && length > 0).then_some(IdMap { container_id, host_id, length })
    };
    list.split(',').map(one).collect::<Option<_>>().ok_or_else(|| {
        invalid(format!("mount option {option:?} has no list of inside:outside:length"))
    })
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
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
        let parsed = Options::parse(&options.map(str::to_owned)).unwrap();
        assert_eq!(
            parsed.flags,
            MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_BIND | MsFlags::MS_REC
        );
        assert_eq!(parsed.propagation, MsFlags::MS_SLAVE | MsFlags::MS_REC);
        assert_eq!(parsed.data, "lowerdir=/a:/b,userxattr");
    }

    #[test]
    fn mapped_ids_come_in_pairs_of_lists() {
        let parse = |options: &[&str]| {
            let options: Vec<String> = options.iter().map(|option| (*option).into()).collect();
            Options::parse(&options)
        };
        let parsed =
            parse(&["uidmap=0:1000:10,10:5000:5", "gidmap=0:2000:15", "lowerdir=/a"]).unwrap();
        let map = |container_id, host_id, length| IdMap { container_id, host_id, length };
        let ids = parsed.ids.unwrap();
        assert_eq!(ids.uids, [map(0, 1000, 10), map(10, 5000, 5)]);
        assert_eq!(ids.gids, [map(0, 2000, 15)]);
        assert_eq!(parsed.data, "lowerdir=/a");
        for wrong in [
            &["uidmap=0:1:2"][..],
            &["uidmap=", "gidmap=0:1:2"],
            &["uidmap=0:1", "gidmap=0:1:2"],
            &["uidmap=0:1:0", "gidmap=0:1:2"],
            &["uidmap=0:1:2:3", "gidmap=0:1:2"],
            &["uidmap=0:-1:2", "gidmap=0:1:2"],
            &["uidmap=0:1:2,", "gidmap=0:1:2"],
        ] {
            let error = parse(wrong).err().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{wrong:?}");
            assert!(error.to_string().contains("uidmap"), "{error}");
        }
    }

    #[test]
    fn layers_are_found_in_the_directory_that_holds_them_all() {
        let data = "index=off,lowerdir=/s/2/fs:/s/1/fs,upperdir=/s/3/fs,workdir=/s/3/work";
        let (common, within) = layers(data).unwrap();
        assert_eq!((common, within), (Path::new("/s"), vec![Path::new("2/fs"), Path::new("1/fs")]));
        assert_eq!(
            with_layers(data, "/r/2/fs:/r/1/fs"),
            "index=off,lowerdir=/r/2/fs:/r/1/fs,upperdir=/s/3/fs,workdir=/s/3/work"
        );
        let (common, within) = layers("lowerdir=/s/1/fs").unwrap();
        assert_eq!((common, within), (Path::new("/s/1"), vec![Path::new("fs")]));
        assert!(layers("upperdir=/a").is_err());
    }

    #[test]
    fn a_target_stays_below_the_root_file_system() {
        let root = Path::new("/r");
        assert_eq!(below(root, "/etc/./x").unwrap(), Path::new("/r/etc/x"));
        assert!(below(root, "a/../../x").is_err());
    }
}
