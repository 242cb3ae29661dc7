//! `exec`: a session of the streaming server; with --timeout ExecSync, because the daemon then ends the
//! command in time.

use std::{
    io::{self, Write as _},
    time::Duration,
};

use anyhow::Result;
use holdfast_protos::cri;

use super::{
    Client,
    args::Exec,
    find::All,
    session::{self, How, Terms},
    terminal::{self, Ends},
};

/// `holdfast exec`
pub(super) async fn exec(client: &mut Client, args: Exec) -> Result<u8> {
    if args.tty {
        terminal::require(args.interactive)?;
    }
    let container = All::list(client).await?.container(&args.name)?;
    if let Some(timeout) = client.timeout()
        && !args.interactive
        && !args.tty
    {
        return sync(client, container.id, args.command, timeout).await;
    }
    let request = cri::ExecRequest {
        container_id: container.id,
        cmd: args.command,
        tty: args.tty,
        stdin: args.interactive,
        stdout: true,
        stderr: !args.tty,
    };
    let mut runtime = client.runtime.clone();
    let url = client.quick(runtime.exec(request)).await?.url;
    // No keys to detach with: a command that its client leaves is hung up on.
    let terms = Terms { tty: args.tty, stdin: args.interactive, ..Terms::default() };
    let mut ends = Ends::catch()?;
    let session = session::open(client, &url).await?;
    match session::join(session, &terms, ends.next()).await? {
        How::Ended(code) => Ok(exit_code(code)),
        How::Signal(number) => Ok(exit_code(128 + number)),
        How::Detached => unreachable!("there are no keys for it"),
    }
}

async fn sync(
    client: &Client,
    container_id: String,
    cmd: Vec<String>,
    timeout: Duration,
) -> Result<u8> {
    let seconds = timeout.as_millis().div_ceil(1000) as i64;
    let request = cri::ExecSyncRequest { container_id, cmd, timeout: seconds };
    let mut runtime = client.runtime.clone();
    // We wait a little longer than the daemon, for it to say that the time is up.
    let call = runtime.exec_sync(request);
    let response = client.slow_and(Duration::from_secs(10), call).await?;
    io::stdout().write_all(&response.stdout)?;
    io::stdout().flush()?;
    io::stderr().write_all(&response.stderr)?;
    Ok(exit_code(response.exit_code))
}

/// A process can exit with 0 to 255 only; whatever else the daemon says, it is no success.
pub(super) fn exit_code(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(u8::MAX)
}
