//! Which servers to ask for a registry, in order: containerd's `hosts.toml` directories, and the
//! defaults when there is none.
//!
//! For `example.com:5000` the first of `example.com_5000_/`, `example.com:5000/` and `_default/`
//! below the hosts directory is read (containerd docs/hosts.md). Files are read anew for each pull:
//! a change needs no restart.

use std::{
    collections::BTreeMap,
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use url::Url;

/// Why a hosts.toml cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It, or a certificate that it names, cannot be read.
    #[error("read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not what containerd calls a hosts.toml.
    #[error("{path} is not valid")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A value in it means nothing.
    #[error("{path}: {what}")]
    Value {
        /// The file.
        path: PathBuf,
        /// Which value and why.
        what: String,
    },
}

/// A server to ask.
#[derive(Clone)]
pub struct Host {
    /// Scheme, host, port, and the path that API paths are appended to ("/v2").
    pub base: Url,
    /// It may turn names into digests.
    pub resolve: bool,
    /// It may be asked for content.
    pub pull: bool,
    /// It is the registry itself, and no mirror.
    pub upstream: bool,
    /// A guess, followed by another one: if nobody answers at once, go on.
    pub guess: bool,
    /// Headers for each request to it; may be secret.
    pub headers: HeaderMap,
    /// TLS.
    pub tls: Tls,
    /// Bound on making a connection, if given.
    pub dial_timeout: Option<Duration>,
    /// It takes what is pushed.
    pub push: bool,
    /// The file that names it; `None`: nothing does.
    pub from: Option<PathBuf>,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.base)
    }
}

/// TLS settings, by content of files so that equal ones share connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tls {
    /// Do not verify the server's certificate.
    pub skip_verify: bool,
    /// More authorities: PEM.
    pub ca: Vec<Vec<u8>>,
    /// Certificates of ours with their keys: PEM.
    pub client: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Host (and port) that serves the API of a registry.
pub fn api_host(registry: &str) -> &str {
    // Docker Hub's name is not the name of its server.
    if registry == "docker.io" { "registry-1.docker.io" } else { registry }
}

/// Whether plain HTTP may be used: a loopback address, or a registry that is configured so.
pub fn plain_allowed(host: &str, port: Option<u16>, insecure: &[String]) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let loopback =
        bare == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    let named = |name: &String| match port {
        Some(port) => *name == format!("{host}:{port}") || name == host,
        None => name == host,
    };
    loopback || insecure.iter().any(named)
}

/// How the node is told to reach registries.
#[derive(Clone, Copy)]
pub struct Rules<'a> {
    /// Where the directories of the registries are.
    pub directory: &'a Path,
    /// Registries that plain HTTP is spoken to.
    pub insecure: &'a [String],
    /// Whether `_default` counts: not for a place that something else names on purpose.
    pub use_default: bool,
    /// Neither certificates nor HTTPS are wanted of this registry.
    pub unverified: bool,
}

/// The servers for `registry`, in order. Reads small files.
pub fn hosts(registry: &str, rules: Rules<'_>) -> Result<Vec<Host>, Error> {
    let mut tls = Tls { skip_verify: rules.unverified, ..Tls::default() };
    let mut insecure = rules.insecure.to_vec();
    if rules.unverified {
        insecure.push(registry.to_owned());
    }
    let Some(path) = find(registry, rules) else {
        return Ok(default_hosts(registry, &insecure, &tls));
    };
    let text = match std::fs::read_to_string(path.join("hosts.toml")) {
        Ok(text) => text,
        // A directory without the file: Docker's layout of certificates.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            tls = Tls { skip_verify: tls.skip_verify, ..docker_certificates(&path)? };
            let mut hosts = default_hosts(registry, &insecure, &tls);
            hosts.iter_mut().for_each(|host| host.from = Some(path.clone()));
            return Ok(hosts);
        }
        Err(source) => return Err(Error::Read { path: path.join("hosts.toml"), source }),
    };
    parse(&text, &path, registry, &insecure, &tls)
}

fn find(registry: &str, rules: Rules<'_>) -> Option<PathBuf> {
    let mut names = Vec::new();
    if let Some((host, port)) = registry.rsplit_once(':')
        && port.bytes().all(|b| b.is_ascii_digit())
    {
        names.push(format!("{host}_{port}_"));
    }
    names.push(registry.to_owned());
    if rules.use_default {
        names.push("_default".to_owned());
    }
    names.iter().map(|name| rules.directory.join(name)).find(|path| path.is_dir())
}

fn default_hosts(registry: &str, insecure: &[String], tls: &Tls) -> Vec<Host> {
    let host = |scheme: &str, guess| {
        // A reference's registry is a host and a port: it always makes a URL.
        let base = Url::parse(&format!("{scheme}://{}/v2", api_host(registry)))
            .expect("registries are parsed by reference");
        Host {
            base,
            resolve: true,
            pull: true,
            upstream: true,
            guess,
            headers: HeaderMap::new(),
            tls: tls.clone(),
            dial_timeout: None,
            push: true,
            from: None,
        }
    };
    let https = host("https", false);
    let (name, port) = (https.base.host_str().unwrap_or_default(), explicit_port(registry));
    if plain_allowed(name, port, insecure) {
        vec![host("https", true), host("http", false)]
    } else {
        vec![https]
    }
}

fn explicit_port(registry: &str) -> Option<u16> {
    registry.rsplit_once(':')?.1.parse().ok()
}

fn docker_certificates(path: &Path) -> Result<Tls, Error> {
    let read = |path: PathBuf| {
        std::fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source })
    };
    let mut tls = Tls::default();
    let entries =
        std::fs::read_dir(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    for file in files {
        match file.extension().and_then(|e| e.to_str()) {
            Some("crt") => tls.ca.push(read(file)?),
            Some("cert") => {
                tls.client.push((read(file.clone())?, read(file.with_extension("key"))?))
            }
            _ => {}
        }
    }
    Ok(tls)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    server: Option<String>,
    #[serde(default)]
    host: BTreeMap<toml::Spanned<String>, Table>,
    // The settings of `server` stand at the top. (serde cannot deny unknown fields and flatten.)
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMore<String>>,
    client: Option<toml::Value>,
    #[serde(default)]
    skip_verify: bool,
    #[serde(default)]
    header: BTreeMap<String, OneOrMore<String>>,
    #[serde(default)]
    override_path: bool,
    dial_timeout: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Table {
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMore<String>>,
    client: Option<toml::Value>,
    #[serde(default)]
    skip_verify: bool,
    #[serde(default)]
    header: BTreeMap<String, OneOrMore<String>>,
    #[serde(default)]
    override_path: bool,
    dial_timeout: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore<T> {
    One(T),
    More(Vec<T>),
}

impl<T> OneOrMore<T> {
    fn into_vec(self) -> Vec<T> {
        match self {
            OneOrMore::One(one) => vec![one],
            OneOrMore::More(more) => more,
        }
    }
}

fn parse(
    text: &str,
    directory: &Path,
    registry: &str,
    insecure: &[String],
    tls: &Tls,
) -> Result<Vec<Host>, Error> {
    let path = directory.join("hosts.toml");
    let file: File = toml::from_str(text)
        .map_err(|e| Error::Parse { path: path.clone(), source: Box::new(e) })?;
    let mut found = Vec::new();
    // The order in the file is the order of trying.
    let mut hosts: Vec<_> = file.host.into_iter().collect();
    hosts.sort_by_key(|(name, _)| name.span().start);
    for (name, table) in hosts {
        found.push(host(name.get_ref(), table, directory)?);
    }
    let top = Table {
        capabilities: file.capabilities,
        ca: file.ca,
        client: file.client,
        skip_verify: file.skip_verify,
        header: file.header,
        override_path: file.override_path,
        dial_timeout: file.dial_timeout,
    };
    match file.server {
        Some(server) => {
            let server = host(&server, top, directory)?;
            // Often the same server is named twice: a failure need not be waited for twice.
            found.retain(|host| host.base != server.base || host.resolve && host.pull);
            if !found.iter().any(|host| host.base == server.base) {
                found.push(server.clone());
            }
            for host in &mut found {
                host.upstream |= host.base.origin() == server.base.origin();
            }
        }
        None => {
            let defaults = default_hosts(registry, insecure, tls);
            for host in &mut found {
                host.upstream |= defaults.iter().any(|d| d.base.origin() == host.base.origin());
            }
            found.extend(defaults);
        }
    }
    Ok(found)
}

fn host(name: &str, table: Table, directory: &Path) -> Result<Host, Error> {
    let path = directory.join("hosts.toml");
    let value = |what: String| Error::Value { path: path.clone(), what };
    // containerd takes a host without a scheme, too.
    let text = if name.contains("://") { name.to_owned() } else { format!("https://{name}") };
    let mut base = Url::parse(&text).map_err(|e| value(format!("host {name:?}: {e}")))?;
    if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none() {
        return Err(value(format!("host {name:?} must be an http or https URL")));
    }
    if !base.username().is_empty() || base.password().is_some() {
        return Err(value(format!(
            "host {:?} must not have credentials in its URL: use a header",
            base.host_str().unwrap_or_default()
        )));
    }
    let trimmed = base.path().trim_end_matches('/').to_owned();
    if table.override_path || trimmed.ends_with("/v2") {
        base.set_path(&trimmed);
    } else {
        base.set_path(&format!("{trimmed}/v2"));
    }
    base.set_query(None);
    let all = table.capabilities.is_none();
    let (mut pull, mut resolve, mut push) = (all, all, all);
    for capability in table.capabilities.iter().flatten() {
        match capability.as_str() {
            "pull" => pull = true,
            "resolve" => resolve = true,
            "push" => push = true,
            other => {
                return Err(value(format!(
                    "capability {other:?} is not one of pull, resolve, push"
                )));
            }
        }
    }
    let mut headers = HeaderMap::new();
    for (name, values) in table.header {
        let parsed: HeaderName =
            name.parse().map_err(|_| value(format!("header {name:?} is not a header's name")))?;
        for text in values.into_vec() {
            let mut text = HeaderValue::from_str(&text)
                .map_err(|_| value(format!("the value of header {name:?} is not valid")))?;
            text.set_sensitive(true);
            headers.append(parsed.clone(), text);
        }
    }
    let read = |file: &str| {
        let path = directory.join(file);
        std::fs::read(&path).map_err(|source| Error::Read { path, source })
    };
    let mut tls = Tls { skip_verify: table.skip_verify, ..Tls::default() };
    for file in table.ca.map(OneOrMore::into_vec).unwrap_or_default() {
        tls.ca.push(read(&file)?);
    }
    for (certificate, key) in client_files(table.client)
        .ok_or_else(|| value("client must be a file, or pairs of certificate and key".to_owned()))?
    {
        let certificate = read(&certificate)?;
        let key = if key.is_empty() { certificate.clone() } else { read(&key)? };
        tls.client.push((certificate, key));
    }
    let dial_timeout = match table.dial_timeout {
        None => None,
        Some(text) => Some(
            seconds(&text)
                .ok_or_else(|| value(format!("dial_timeout {text:?} is not a duration")))?,
        ),
    };
    Ok(Host {
        base,
        resolve,
        pull,
        upstream: false,
        guess: false,
        headers,
        tls,
        dial_timeout,
        push,
        from: Some(path),
    })
}

/// `"a.pem"`, `["a.pem", …]` or `[["a.crt", "a.key"], …]`.
fn client_files(value: Option<toml::Value>) -> Option<Vec<(String, String)>> {
    let text = |value: &toml::Value| value.as_str().map(str::to_owned);
    match value {
        None => Some(Vec::new()),
        Some(toml::Value::String(one)) => Some(vec![(one, String::new())]),
        Some(toml::Value::Array(more)) => more
            .iter()
            .map(|item| match item {
                toml::Value::Array(pair) => match pair.as_slice() {
                    [certificate] => Some((text(certificate)?, String::new())),
                    [certificate, key] => Some((text(certificate)?, text(key)?)),
                    _ => None,
                },
                item => Some((text(item)?, String::new())),
            })
            .collect(),
        Some(_) => None,
    }
}

/// A Go duration: "500ms", "3s", "1m30s", "1.5h".
fn seconds(text: &str) -> Option<Duration> {
    let (mut rest, mut sum) = (text, 0.0);
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..end].parse().ok()?;
        let after = &rest[end..];
        let end = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        sum += number
            * match &after[..end] {
                "ms" => 0.001,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return None,
            };
        rest = &after[end..];
    }
    if text.is_empty() { None } else { Duration::try_from_secs_f64(sum).ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bases(hosts: &[Host]) -> Vec<&str> {
        hosts.iter().map(|host| host.base.as_str()).collect()
    }

    fn rules(directory: &Path) -> Rules<'_> {
        Rules { directory, insecure: &[], use_default: true, unverified: false }
    }

    fn write(directory: &Path, name: &str, text: &str) {
        std::fs::create_dir_all(directory.join(name)).unwrap();
        std::fs::write(directory.join(name).join("hosts.toml"), text).unwrap();
    }

    #[test]
    fn without_files_https_is_used_and_http_only_where_it_may() {
        let dir = tempfile::tempdir().unwrap();
        let ask = |registry: &str| {
            let insecure = ["plain.example:5000".to_owned()];
            bases(&hosts(registry, Rules { insecure: &insecure, ..rules(dir.path()) }).unwrap())
                .iter()
                .map(|s| (*s).to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(ask("docker.io"), ["https://registry-1.docker.io/v2"]);
        assert_eq!(ask("example.com:5000"), ["https://example.com:5000/v2"]);
        assert_eq!(ask("plain.example:5001"), ["https://plain.example:5001/v2"]);
        for plain in ["127.0.0.1:5000", "localhost:5000", "[::1]:5000", "plain.example:5000"] {
            assert_eq!(
                ask(plain),
                [format!("https://{plain}/v2"), format!("http://{plain}/v2")],
                "{plain}"
            );
        }
        // Not loopback addresses, however they look.
        for other in ["127.0.0.1.example.com", "localhost.example.com:5000", "0.0.0.0:5000"] {
            assert_eq!(ask(other).len(), 1, "{other}");
        }
    }

    #[test]
    fn hosts_are_tried_as_written_and_the_server_last() {
        let dir = tempfile::tempdir().unwrap();
        write(
            dir.path(),
            "example.com_5000_",
            r#"
server = "https://upstream.example"
[host."https://z.example"]
  capabilities = ["pull"]
  skip_verify = true
[host."http://a.example:8080/mirror/v2/x"]
  override_path = true
  [host."http://a.example:8080/mirror/v2/x".header]
    x-token = "secret"
    x-more = ["1", "2"]
[host."https://b.example/sub/"]
  dial_timeout = "3s"
"#,
        );
        let found = hosts("example.com:5000", rules(dir.path())).unwrap();
        assert_eq!(
            bases(&found),
            [
                "https://z.example/v2",
                "http://a.example:8080/mirror/v2/x",
                "https://b.example/sub/v2",
                "https://upstream.example/v2",
            ]
        );
        assert!(found[0].pull && !found[0].resolve && found[0].tls.skip_verify);
        assert_eq!(found[1].headers.get_all("x-more").iter().count(), 2);
        assert!(!format!("{found:?}").contains("secret"));
        assert_eq!(found[2].dial_timeout, Some(Duration::from_secs(3)));
        assert_eq!(
            found.iter().map(|h| h.upstream).collect::<Vec<_>>(),
            [false, false, false, true]
        );
    }

    #[test]
    fn without_a_server_the_registry_itself_is_last() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "docker.io", "[host.\"https://mirror.example\"]\n");
        let found = hosts("docker.io", rules(dir.path())).unwrap();
        assert_eq!(bases(&found), ["https://mirror.example/v2", "https://registry-1.docker.io/v2"]);
        write(dir.path(), "_default", "server = \"http://127.0.0.1:9\"\n");
        assert_eq!(
            bases(&hosts("other.example", rules(dir.path())).unwrap()),
            ["http://127.0.0.1:9/v2"]
        );
    }

    #[test]
    fn a_place_of_another_file_has_its_own_directory_but_not_the_default_one() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "_default", "server = \"http://127.0.0.1:9\"\n");
        let place = Rules { use_default: false, unverified: true, ..rules(dir.path()) };
        let found = hosts("plain.example:5000", place).unwrap();
        assert_eq!(
            bases(&found),
            ["https://plain.example:5000/v2", "http://plain.example:5000/v2"]
        );
        assert!(found.iter().all(|host| host.tls.skip_verify && host.from.is_none()));
        write(dir.path(), "plain.example_5000_", "[host.\"https://mirror.example\"]\n");
        let found = hosts("plain.example:5000", place).unwrap();
        assert_eq!(found.len(), 3);
        assert!(!found[0].tls.skip_verify, "its file speaks for itself");
        assert!(found[0].from.as_ref().unwrap().ends_with("plain.example_5000_/hosts.toml"));
    }

    #[test]
    fn durations_are_those_of_go() {
        for (text, want) in [
            ("500ms", Some(0.5)),
            ("3s", Some(3.0)),
            ("1m30s", Some(90.0)),
            ("1.5h", Some(5400.0)),
            ("", None),
            ("3", None),
            ("s", None),
            ("-1s", None),
            ("1x", None),
            ("99999999999999999999h", None),
        ] {
            assert_eq!(seconds(text).map(|d| d.as_secs_f64()), want, "{text}");
        }
    }

    #[test]
    fn mistakes_are_told_with_the_file() {
        let dir = tempfile::tempdir().unwrap();
        for (text, part) in [
            ("server = 1", "not valid"),
            ("sever = \"https://a\"", "not valid"),
            ("[host.\"https://a\"]\ncapabilities = [\"pul\"]", "\"pul\""),
            ("[host.\"ftp://a\"]", "http or https"),
            ("[host.\"https://u:p@a\"]", "credentials"),
            ("[host.\"https://a\"]\nca = \"missing.pem\"", "missing.pem"),
            ("[host.\"https://a\"]\ndial_timeout = \"soon\"", "soon"),
            ("[host.\"https://a\"]\nclient = 3", "client"),
        ] {
            write(dir.path(), "example.com", text);
            let error = hosts("example.com", rules(dir.path())).expect_err(text);
            let text = crate::error::chain(&error);
            assert!(text.contains(part) && text.contains("example.com"), "{text}");
        }
    }
}
