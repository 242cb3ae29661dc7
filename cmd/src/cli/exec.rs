//! `exec`: ExecSync. An interactive exec needs the daemon's streaming server, which is not built yet.

use std::{
    io::{self, Write as _},
    time::Duration,
};

use anyhow::{Result, bail};
use holdfast_protos::cri;

use super::{Client, args::Exec, find::All};

/// `holdfast exec`
pub(super) async fn exec(client: &mut Client, args: Exec) -> Result<u8> {
    if args.interactive || args.tty {
        bail!("exec -i and -t need streaming, which is not built yet; without them, exec works");
    }
    let container = All::list(client).await?.container(&args.name)?;
    // The daemon ends the command at its timeout; we wait a little longer for it to say so.
    let timeout = client.timeout();
    let seconds = timeout.map_or(0, |t| t.as_millis().div_ceil(1000) as i64);
    let request =
        cri::ExecSyncRequest { container_id: container.id, cmd: args.command, timeout: seconds };
    let mut runtime = client.runtime.clone();
    let call = runtime.exec_sync(request);
    let response = match timeout {
        Some(_) => client.slow_and(Duration::from_secs(10), call).await?,
        None => client.long(call).await?,
    };
    io::stdout().write_all(&response.stdout)?;
    io::stdout().flush()?;
    io::stderr().write_all(&response.stderr)?;
    Ok(exit_code(response.exit_code))
}

/// A process can exit with 0 to 255 only; whatever else the daemon says, it is no success.
pub(super) fn exit_code(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(u8::MAX)
}
