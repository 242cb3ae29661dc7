//! `attach`: our terminal, or pipe, on a container that runs.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use holdfast_protos::cri;
use serde_json::Value;

use super::{
    Client, Hint,
    args::Attach,
    exec::exit_code,
    find::All,
    logs,
    session::{self, How, Terms},
    terminal::{self, Ends},
};

/// How long a container may take to exit once its output has ended.
const EXIT: Duration = Duration::from_secs(2);

/// `holdfast attach`
pub(super) async fn attach(client: &mut Client, args: Attach) -> Result<u8> {
    let container = All::list(client).await?.container(&args.name)?;
    let has = streams(client, &container.id).await?;
    if args.interactive && !has.stdin {
        return Err(Hint::on(
            anyhow!("container {} takes no input: it was made without stdin", args.name),
            "leave out -i to see its output",
        ));
    }
    let terms = Terms { tty: has.tty, stdin: args.interactive, keys: args.detach_keys };
    if terms.tty && terms.stdin {
        terminal::require(true)
            .map_err(|_| anyhow!("container {} has a terminal, and stdin is none", args.name))?;
    }
    let mut ends = Ends::catch()?;
    let url = url(client, &container.id, &terms).await?;
    let session = session::open(client, &url).await?;
    match session::join(session, &terms, ends.next()).await {
        Ok(How::Ended(_)) => {
            let exited = logs::follow(client, &container.id, None, logs::Style::default());
            match tokio::time::timeout(EXIT, exited).await {
                Ok(status) => match status? {
                    Some(status) => Ok(exit_code(status.exit_code)),
                    None => bail!("the container was removed; its exit code is not known"),
                },
                Err(_) => {
                    let error = anyhow!("the container's output ended here, and it runs on");
                    Err(Hint::on(error, format!("attach again: holdfast attach {}", args.name)))
                }
            }
        }
        Ok(How::Detached) => {
            note_detached(&args.name);
            Ok(0)
        }
        // Like a program that is killed: the container is not asked to end.
        Ok(How::Signal(number)) => Ok(exit_code(128 + number)),
        Err(error) if session::is_lost(&error) => Err(lost(error, &args.name)),
        Err(error) => Err(error),
    }
}

/// The URL of a session with a container's own process.
pub(super) async fn url(client: &Client, id: &str, terms: &Terms) -> Result<String> {
    let request = cri::AttachRequest {
        container_id: id.to_owned(),
        stdin: terms.stdin,
        tty: terms.tty,
        stdout: true,
        stderr: !terms.tty,
    };
    let mut runtime = client.runtime.clone();
    Ok(client.quick(runtime.attach(request)).await?.url)
}

/// Says how to come back.
pub(super) fn note_detached(name: &str) {
    use std::io::Write as _;
    // The terminal may be gone.
    let _ = writeln!(
        std::io::stderr(),
        "\nholdfast: {name} runs on; to get back: holdfast attach -i {name}"
    );
}

/// Adds what to do when the daemon went away.
pub(super) fn lost(error: anyhow::Error, name: &str) -> anyhow::Error {
    let hint = format!("the container runs on; when the daemon is back: holdfast attach {name}");
    Hint::on(error, hint)
}

/// What a container was made with; the CRI has no field for it.
struct Streams {
    tty: bool,
    stdin: bool,
}

async fn streams(client: &Client, id: &str) -> Result<Streams> {
    let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: true };
    let mut runtime = client.runtime.clone();
    let mut response = client.quick(runtime.container_status(request)).await?;
    let info = response.info.remove("info").unwrap_or_default();
    let info: Value =
        serde_json::from_str(&info).context("read what the daemon has on the container")?;
    let has = |name: &str| info["config"][name].as_bool().unwrap_or_default();
    Ok(Streams { tty: has("tty"), stdin: has("stdin") })
}
