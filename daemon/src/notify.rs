//! sd_notify(3), the two messages that we send. A socket and a line of text: no library is needed.

use std::os::{
    linux::net::SocketAddrExt,
    unix::net::{SocketAddr, UnixDatagram},
};

/// The daemon serves.
pub fn ready() {
    send("READY=1");
}

/// The daemon is ending.
pub fn stopping() {
    send("STOPPING=1");
}

fn send(message: &str) {
    let Ok(path) = std::env::var("NOTIFY_SOCKET") else { return };
    let address = match path.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let sent = address
        .and_then(|address| UnixDatagram::unbound()?.send_to_addr(message.as_bytes(), &address));
    if let Err(error) = sent {
        tracing::warn!(%path, %error, "systemd could not be told {message}");
    }
}
