//! Who the container's first process is: the CRI's words and the image's `User`, looked up in the
//! image's own /etc/passwd and /etc/group.

use std::collections::BTreeSet;

use super::Error;
use crate::pod::config::{GroupsPolicy, Security, User};

/// Resolves the user.
///
/// `passwd` and `group` are the files of the image (empty where it has none). What the container
/// names wins over `image_user`; an id without an entry in passwd is in group 0, as everywhere in
/// Kubernetes. The groups always have the primary one among them: a file's permissions for its
/// group could otherwise be evaded by dropping it with setgroups(2) (CVE-2022-36109).
pub fn resolve(
    passwd: &[u8],
    group: &[u8],
    container: &Security,
    image_user: &str,
) -> Result<User, Error> {
    let named = if !container.run_as_username.is_empty() {
        Some(container.run_as_username.clone())
    } else if let Some(uid) = container.run_as_user {
        Some(id("security.run_as_user", uid)?.to_string())
    } else {
        None
    };
    let (field, user, image_group) = match (&named, container.run_as_group) {
        (Some(user), _) => {
            // The CRI has a field for the group; CRI clients that know Docker's form use that too.
            let (user, group) = split(user);
            ("security.run_as_username", user, group)
        }
        (None, Some(gid)) => {
            return Err(Error::invalid(
                "security.run_as_group",
                format!("group {gid} is given without a user; give run_as_user as well"),
            ));
        }
        (None, None) => {
            let (user, group) = split(image_user);
            ("the image's user", user, group)
        }
    };
    let entry = match user {
        "" => by_uid(passwd, 0).unwrap_or_default(),
        number if is_number(number) => {
            let uid = parse_id(field, number)?;
            by_uid(passwd, uid).unwrap_or(Entry { uid, ..Entry::default() })
        }
        name => entries(passwd).find(|entry| entry.name == name).ok_or_else(|| {
            Error::invalid(field, format!("{name:?} is not in the image's /etc/passwd"))
        })?,
    };
    let gid = match (container.run_as_group, image_group) {
        (Some(gid), _) => id("security.run_as_group", gid)?,
        (None, None | Some("")) => entry.gid,
        (None, Some(number)) if is_number(number) => parse_id(field, number)?,
        (None, Some(name)) => {
            groups(group).find(|group| group.name == name).map(|group| group.gid).ok_or_else(
                || Error::invalid(field, format!("{name:?} is not in the image's /etc/group")),
            )?
        }
    };
    let mut gids = BTreeSet::from([gid]);
    if container.supplemental_groups_policy == GroupsPolicy::Merge && !entry.name.is_empty() {
        gids.extend(
            groups(group)
                .filter(|group| group.members.split(',').any(|member| member == entry.name))
                .map(|group| group.gid),
        );
    }
    for gid in &container.supplemental_groups {
        gids.insert(id("security.supplemental_groups", *gid)?);
    }
    Ok(User {
        uid: entry.uid,
        gid,
        additional_gids: gids.into_iter().collect(),
        home: entry.home.to_owned(),
    })
}

/// An entry of passwd(5).
#[derive(Clone, Copy, Default)]
struct Entry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

/// An entry of group(5).
struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// Lines that are no entries are skipped: images have comments and NIS markers there.
fn lines(file: &[u8]) -> impl Iterator<Item = std::str::Split<'_, char>> {
    file.split(|byte| *byte == b'\n')
        .filter_map(|line| std::str::from_utf8(line).ok())
        .map(|line| line.trim_end_matches('\r').split(':'))
}

fn entries(passwd: &[u8]) -> impl Iterator<Item = Entry<'_>> {
    lines(passwd).filter_map(|mut fields| {
        let name = fields.next().filter(|name| !name.is_empty())?;
        let _password = fields.next()?;
        let uid = fields.next()?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or_default();
        Some(Entry { name, uid, gid, home })
    })
}

fn groups(group: &[u8]) -> impl Iterator<Item = Group<'_>> {
    lines(group).filter_map(|mut fields| {
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some(Group { name, gid, members: fields.next().unwrap_or_default() })
    })
}

fn by_uid(passwd: &[u8], uid: u32) -> Option<Entry<'_>> {
    entries(passwd).find(|entry| entry.uid == uid)
}

fn split(user: &str) -> (&str, Option<&str>) {
    match user.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (user, None),
    }
}

fn is_number(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
}

fn parse_id(field: &'static str, text: &str) -> Result<u32, Error> {
    id(field, text.parse().unwrap_or(i64::MAX))
}

/// (uid_t)-1 means "leave as it is" to the kernel, so it is no id.
fn id(field: &'static str, value: i64) -> Result<u32, Error> {
    u32::try_from(value).ok().filter(|id| *id != u32::MAX).ok_or_else(|| {
        Error::invalid(field, format!("{value} is not an id; it must be 0 to {}", u32::MAX - 1))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n# a comment\n+::::::\n\
        alice:x:1000:2000:Alice:/home/alice:/bin/sh\r\n\xff\xfe:x:5:5::/:\n\
        broken:x:many:0::/:\nshort:x:7\nnohome:x:1001:2001\n";
    const GROUP: &[u8] = b"root:x:0:\nwheel:x:10:root,alice\naudio:x:29:alice\nstaff:x:50:bob\n";

    fn user(security: Security, image: &str) -> Result<User, Error> {
        resolve(PASSWD, GROUP, &security, image)
    }

    fn ids(user: &User) -> (u32, u32, &[u32]) {
        (user.uid, user.gid, &user.additional_gids)
    }

    #[test]
    fn an_images_user_in_every_form() {
        let image = |text| user(Security::default(), text);
        for (text, uid, gid, groups) in [
            ("", 0, 0, &[0, 10][..]),
            ("root", 0, 0, &[0, 10]),
            ("alice", 1000, 2000, &[10, 29, 2000]),
            ("1000", 1000, 2000, &[10, 29, 2000]),
            ("1000:29", 1000, 29, &[10, 29]),
            ("alice:staff", 1000, 50, &[10, 29, 50]),
            ("alice:", 1000, 2000, &[10, 29, 2000]),
            (":staff", 0, 50, &[10, 50]),
            ("4242", 4242, 0, &[0]),
            ("4242:4343", 4242, 4343, &[4343]),
            ("nohome", 1001, 2001, &[2001]),
        ] {
            assert_eq!(ids(&image(text).unwrap()), (uid, gid, groups), "{text:?}");
        }
        assert_eq!(image("alice").unwrap().home, "/home/alice");
        assert_eq!(image("4242").unwrap().home, "");
    }

    #[test]
    fn unknown_names_and_impossible_ids_are_refused() {
        for (text, says) in [
            ("mallory", "the image's user: \"mallory\" is not in the image's /etc/passwd"),
            ("alice:nobody", "the image's user: \"nobody\" is not in the image's /etc/group"),
            ("short", "the image's user: \"short\" is not in the image's /etc/passwd"),
            ("broken", "the image's user: \"broken\" is not in the image's /etc/passwd"),
            ("4294967295", "the image's user: 4294967295 is not an id; it must be 0 to 4294967294"),
        ] {
            assert_eq!(user(Security::default(), text).unwrap_err().to_string(), says);
        }
        assert!(resolve(b"", b"", &Security::default(), "root").is_err());
        assert_eq!(ids(&resolve(b"", b"", &Security::default(), "").unwrap()), (0, 0, &[0][..]));
        let negative = Security { run_as_user: Some(-1), ..Security::default() };
        assert!(user(negative, "").is_err());
        let huge = Security { supplemental_groups: vec![1 << 40], ..Security::default() };
        assert!(user(huge, "").is_err());
    }

    #[test]
    fn the_container_wins_over_the_image() {
        let by_id = Security { run_as_user: Some(1000), ..Security::default() };
        assert_eq!(ids(&user(by_id.clone(), "root:0").unwrap()), (1000, 2000, &[10, 29, 2000][..]));
        let with_group = Security { run_as_group: Some(7), ..by_id.clone() };
        assert_eq!(ids(&user(with_group, "root").unwrap()), (1000, 7, &[7, 10, 29][..]));
        let by_name = Security { run_as_username: "alice".into(), ..Security::default() };
        assert_eq!(user(by_name, "").unwrap().uid, 1000);
        let alone = Security { run_as_group: Some(7), ..Security::default() };
        assert_eq!(
            user(alone, "alice").unwrap_err().to_string(),
            "security.run_as_group: group 7 is given without a user; give run_as_user as well"
        );
        let root = Security { run_as_user: Some(0), ..Security::default() };
        assert_eq!(user(root, "alice").unwrap().uid, 0);
    }

    #[test]
    fn strict_takes_only_the_groups_that_are_asked_for() {
        let mut security = Security {
            run_as_user: Some(1000),
            supplemental_groups: vec![500, 10, 500],
            ..Security::default()
        };
        assert_eq!(user(security.clone(), "").unwrap().additional_gids, [10, 29, 500, 2000]);
        security.supplemental_groups_policy = GroupsPolicy::Strict;
        assert_eq!(user(security, "").unwrap().additional_gids, [10, 500, 2000]);
    }

    proptest! {
        #[test]
        fn no_file_of_an_image_panics(passwd: Vec<u8>, group: Vec<u8>, image: String) {
            if let Ok(user) = resolve(&passwd, &group, &Security::default(), &image) {
                prop_assert!(user.additional_gids.contains(&user.gid));
                prop_assert!(user.additional_gids.is_sorted());
            }
        }

        #[test]
        fn entries_round_trip(name in "[a-z_][a-z0-9_-]{0,10}", uid in 1u32..u32::MAX, gid in 0u32..u32::MAX) {
            let passwd = format!("x:x:0:0:::\n{name}:x:{uid}:{gid}:,,:/h:/s\n");
            prop_assume!(name != "x");
            let user = resolve(passwd.as_bytes(), b"", &Security::default(), &name).unwrap();
            prop_assert_eq!((user.uid, user.gid, user.home.as_str()), (uid, gid, "/h"));
        }
    }
}
