//! Credentials that the node itself has: a docker config.json (`auths`, `credHelpers`,
//! `credsStore`; also containers-auth.json(5)) and the helper programs that it names.
//!
//! They are looked up by name, the most specific entry first, and only when a registry refuses an
//! anonymous request: images that everybody may have start no program. The file is read each time.
//! A program gets a server's name on stdin and answers in JSON (docker/docker-credential-helpers);
//! one that does not within [`DEADLINE`] is killed.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use base64::Engine as _;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::registry::Auth;

/// Longest that a helper may take.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// Largest file, and largest answer of a helper, in bytes.
const MAX: u64 = 1 << 20;

/// What Docker Hub is called in docker's files and by its helpers.
const HUB: &str = "https://index.docker.io/v1/";

/// Why there are no credentials. No message has any part of one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("read credentials {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no docker config.json.
    #[error("{path} is not valid: {what}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where, without what is there.
        what: String,
    },
    /// A helper's name could leave PATH.
    #[error("{path}: credential helper {name:?} is not a plain name")]
    Name {
        /// The file.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// A helper did not run.
    #[error("run credential helper {program}")]
    Run {
        /// Its program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// A helper did not answer.
    #[error("credential helper {program} gave no answer within {} s", after.as_secs())]
    Deadline {
        /// Its program.
        program: String,
        /// For so long.
        after: Duration,
    },
    /// A helper failed.
    #[error("credential helper {program}: {what}")]
    Helper {
        /// Its program.
        program: String,
        /// What is wrong.
        what: String,
    },
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct File {
    auths: BTreeMap<String, Entry>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

/// How helpers are run.
struct Run {
    deadline: Duration,
    /// Instead of PATH.
    path: Option<PathBuf>,
}

/// The credentials of the node for `name` (registry and repository), if it has any. `helpers` are
/// programs to ask when the file knows nothing, in order.
pub async fn find(
    file: Option<&Path>,
    helpers: &[String],
    name: &str,
) -> Result<Option<Auth>, Error> {
    find_with(file, helpers, name, &Run { deadline: DEADLINE, path: None }).await
}

async fn find_with(
    file: Option<&Path>,
    helpers: &[String],
    name: &str,
    run: &Run,
) -> Result<Option<Auth>, Error> {
    let registry = name.split('/').next().unwrap_or(name);
    let server = if registry == "docker.io" { HUB } else { registry };
    if let Some(path) = file {
        let file = read(path).await?;
        if let Some((key, helper)) = best(&file.cred_helpers, name) {
            let server = if normal(key) == registry { server } else { key };
            return ask(path, helper, server, run).await;
        }
        if let Some((_, entry)) = best(&file.auths, name)
            && let Some(auth) = entry.auth(path)?
        {
            return Ok(Some(auth));
        }
        if !file.creds_store.is_empty()
            && let Some(auth) = ask(path, &file.creds_store, server, run).await?
        {
            return Ok(Some(auth));
        }
    }
    for helper in helpers {
        // What containers-registries.conf(5) calls the file itself.
        if helper != "containers-auth.json"
            && let Some(auth) = ask(Path::new("registries.conf"), helper, server, run).await?
        {
            return Ok(Some(auth));
        }
    }
    Ok(None)
}

async fn read(path: &Path) -> Result<File, Error> {
    let file = match tokio::fs::File::open(path).await {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(File::default()),
        Err(source) => return Err(Error::Read { path: path.into(), source }),
    };
    let mut bytes = Vec::new();
    let got = file.take(MAX + 1).read_to_end(&mut bytes).await;
    got.map_err(|source| Error::Read { path: path.into(), source })?;
    if bytes.len() as u64 > MAX {
        return Err(Error::Parse { path: path.into(), what: format!("more than {MAX} bytes") });
    }
    serde_json::from_slice(&bytes).map_err(|e| Error::Parse {
        path: path.into(),
        // serde's own words may quote the value.
        what: format!("{} at line {} column {}", category(&e), e.line(), e.column()),
    })
}

fn category(error: &serde_json::Error) -> &'static str {
    match error.classify() {
        serde_json::error::Category::Data => "a value of the wrong type",
        _ => "no JSON",
    }
}

impl Entry {
    fn auth(&self, path: &Path) -> Result<Option<Auth>, Error> {
        let empty =
            [&self.auth, &self.username, &self.password, &self.identitytoken, &self.registrytoken];
        // `docker login` with a credsStore leaves entries like this.
        if empty.iter().all(|field| field.is_empty()) {
            return Ok(None);
        }
        let valid = self.auth.is_empty()
            || base64::engine::general_purpose::STANDARD
                .decode(self.auth.trim())
                .is_ok_and(|pair| pair.contains(&b':'));
        if !valid {
            return Err(Error::Parse {
                path: path.into(),
                what: "an \"auth\" is not base64 of user:password".to_owned(),
            });
        }
        Ok(Some(Auth {
            username: self.username.clone(),
            password: self.password.clone(),
            auth: self.auth.clone(),
            identity_token: self.identitytoken.clone(),
            registry_token: self.registrytoken.clone(),
            ..Auth::default()
        }))
    }
}

/// A key as a name: "https://index.docker.io/v1/" is "docker.io".
fn normal(key: &str) -> String {
    let (key, was_url) = match key.split_once("://") {
        Some((_, rest)) => (rest, true),
        None => (key, false),
    };
    let mut key = key.trim_end_matches('/');
    if was_url {
        key = key.strip_suffix("/v1").or_else(|| key.strip_suffix("/v2")).unwrap_or(key);
    }
    let (registry, rest) = match key.find('/') {
        Some(at) => key.split_at(at),
        None => (key, ""),
    };
    let registry = match registry {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        other => other,
    };
    // Docker's oldest files have the API's path in them without a scheme.
    let rest = if rest == "/v1" || rest == "/v2" { "" } else { rest };
    format!("{registry}{rest}")
}

/// The entry of the longest key that `name` is or lies below.
fn best<'a, T>(entries: &'a BTreeMap<String, T>, name: &str) -> Option<(&'a str, &'a T)> {
    entries
        .iter()
        .filter_map(|(key, value)| {
            let normal = normal(key);
            let rest = name.strip_prefix(&normal)?;
            (!normal.is_empty() && (rest.is_empty() || rest.starts_with('/'))).then_some((
                normal.len(),
                key.as_str(),
                value,
            ))
        })
        .max_by_key(|(length, ..)| *length)
        .map(|(_, key, value)| (key, value))
}

/// Asks `docker-credential-<helper>`.
async fn ask(
    from: &Path,
    helper: &str,
    server: &str,
    settings: &Run,
) -> Result<Option<Auth>, Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        username: String,
        secret: String,
    }
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    if helper.is_empty() || helper.starts_with('.') || !helper.bytes().all(plain) {
        return Err(Error::Name { path: from.into(), name: helper.to_owned() });
    }
    let program = format!("docker-credential-{helper}");
    let run = |source| Error::Run { program: program.clone(), source };
    let mut command = tokio::process::Command::new(&program);
    if let Some(path) = &settings.path {
        command.env("PATH", path);
    }
    let mut child = command
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        // A group of its own, so that what it starts ends with it.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(run)?;
    let group = Group(child.id().and_then(|id| i32::try_from(id).ok()));
    let mut stdin = child.stdin.take().expect("it is piped");
    let mut stdout = child.stdout.take().expect("it is piped").take(MAX);
    let mut answer = Vec::new();
    let talk = async {
        // One that reads nothing may still answer.
        let _ = stdin.write_all(format!("{server}\n").as_bytes()).await;
        drop(stdin);
        stdout.read_to_end(&mut answer).await?;
        child.wait().await
    };
    let status = match tokio::time::timeout(settings.deadline, talk).await {
        Ok(status) => status.map_err(run)?,
        Err(_) => {
            drop(group);
            return Err(Error::Deadline { program, after: settings.deadline });
        }
    };
    // It is reaped: its number may be another's by now.
    std::mem::forget(group);
    let failed = |what: String| Error::Helper { program: program.clone(), what };
    if !status.success() {
        // The library that helpers are written with says so on stdout, with exit code 1.
        if String::from_utf8_lossy(&answer).contains("credentials not found") {
            return Ok(None);
        }
        return Err(failed(format!("it ended with {status}")));
    }
    let answer: Answer = serde_json::from_slice(&answer)
        .map_err(|_| failed("its answer is not the JSON of a credential helper".to_owned()))?;
    Ok(Some(match answer.username.as_str() {
        "<token>" => Auth { identity_token: answer.secret, ..Auth::default() },
        _ => Auth { username: answer.username, password: answer.secret, ..Auth::default() },
    }))
}

/// A process group that is killed when dropped.
struct Group(Option<i32>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0.and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn base64(text: &str) -> String {
        base64::engine::general_purpose::STANDARD.encode(text)
    }

    async fn user(file: &Path, name: &str) -> Option<String> {
        let auth = find(Some(file), &[], name).await.unwrap()?;
        Some(if auth.auth.is_empty() { auth.username } else { auth.auth })
    }

    #[tokio::test]
    async fn the_most_specific_entry_counts() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        let auth = |text: &str| serde_json::json!({ "auth": base64(text) });
        let text = serde_json::json!({"auths": {
            "https://index.docker.io/v1/": auth("hub:x"),
            "r.example:5000": auth("host:x"),
            "r.example:5000/team": auth("team:x"),
            "https://url.example/v2/": {"username": "url", "password": "x"},
            "empty.example": {},
        }});
        std::fs::write(&file, text.to_string()).unwrap();
        for (name, want) in [
            ("docker.io/library/busybox", Some(base64("hub:x"))),
            ("r.example:5000/other/a", Some(base64("host:x"))),
            ("r.example:5000/team/a", Some(base64("team:x"))),
            ("r.example:5000/teams/a", Some(base64("host:x"))),
            ("r.example/team/a", None),
            ("url.example/a", Some("url".to_owned())),
            ("empty.example/a", None),
            ("evil.example/r.example:5000/a", None),
        ] {
            assert_eq!(user(&file, name).await, want, "{name}");
        }
        assert_eq!(user(&dir.path().join("missing"), "a.example/b").await, None);
    }

    #[tokio::test]
    async fn broken_files_are_refused_without_their_secrets() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        for text in [
            r#"{"auths":{"a.example":{"auth":"s3cret"}}}"#,
            r#"{"auths":{"a.example":{"auth":["s3cret"]}}}"#,
            r#"{"auths":"s3cret"}"#,
            "s3cret",
            r#"{"credHelpers":{"a.example":"../s3cret"}}"#,
        ] {
            std::fs::write(&file, text).unwrap();
            let error = find(Some(&file), &[], "a.example/b").await.expect_err(text);
            let said = crate::error::chain(&error);
            assert!(said.contains("config.json"), "{said}");
            assert!(!said.contains("\"s3cret") && !said.contains("s3cret`"), "{said}");
        }
    }

    #[tokio::test]
    async fn helper_programs_are_asked_and_have_a_deadline() {
        let dir = tempfile::tempdir().unwrap();
        for (helper, script) in [
            (
                "good",
                "read s; echo \"{\\\"ServerURL\\\":\\\"$s\\\",\\\"Username\\\":\\\"for $s\\\",\\\"Secret\\\":\\\"x\\\"}\"",
            ),
            ("token", "echo '{\"ServerURL\":\"\",\"Username\":\"<token>\",\"Secret\":\"t\"}'"),
            ("none", "echo 'credentials not found in native keychain'; exit 1"),
            ("fails", "echo s3cret; exit 3"),
            ("hangs", "sleep 1000 & echo $! > \"${0%/*}/pid\"; sleep 1000"),
        ] {
            let path = dir.path().join(format!("docker-credential-{helper}"));
            std::fs::write(&path, format!("#!/bin/sh\nPATH=/bin:/usr/bin\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let file = dir.path().join("config.json");
        let write = |text: serde_json::Value| std::fs::write(&file, text.to_string()).unwrap();
        write(serde_json::json!({
            "credHelpers": {"a.example": "good", "t.example": "token"},
            "credsStore": "none",
        }));
        let bin = dir.path().to_owned();
        let ask = |registry: &'static str, helpers: &[&str]| {
            let (file, path) = (file.clone(), Some(bin.clone()));
            let helpers: Vec<String> = helpers.iter().map(|h| (*h).to_owned()).collect();
            let hangs = helpers.iter().any(|helper| helper == "hangs");
            let run = Run { deadline: Duration::from_secs(if hangs { 1 } else { 30 }), path };
            async move { find_with(Some(&file), &helpers, registry, &run).await }
        };
        let auth = ask("a.example/x", &[]).await.unwrap().unwrap();
        assert_eq!((auth.username.as_str(), auth.password.as_str()), ("for a.example", "x"));
        let auth = ask("t.example/x", &[]).await.unwrap().unwrap();
        assert_eq!(auth.identity_token, "t");
        assert!(ask("b.example/x", &[]).await.unwrap().is_none());
        let auth = ask("docker.io/x", &["none", "good"]).await.unwrap().unwrap();
        assert_eq!(auth.username, format!("for {HUB}"));
        let error = ask("b.example/x", &["fails"]).await.unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && !error.contains("s3cret"), "{error}");
        assert!(matches!(ask("b.example/x", &["missing"]).await, Err(Error::Run { .. })));
        let hung = ask("b.example/x", &["hangs"]).await;
        assert!(matches!(hung, Err(Error::Deadline { .. })), "{hung:?}");
        // What it started is gone with it.
        let pid = std::fs::read_to_string(dir.path().join("pid")).unwrap();
        let by = std::time::Instant::now() + Duration::from_secs(10);
        loop {
            let left = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
            if left.map_or(true, |stat| stat.contains(") Z ")) {
                break;
            }
            assert!(std::time::Instant::now() < by, "{pid}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
