//! The terminal that holdfast runs in: raw while a session has it, and as it was before on every way
//! out, a panic included.

use std::{
    io::{self, IsTerminal as _},
    sync::{Mutex, Once, PoisonError},
};

use anyhow::{Context as _, Result, bail};
use holdfast_streaming::Size;
use nix::sys::{
    signal::{Signal as Number, raise},
    termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr},
};
use rustix::termios::tcgetwinsize;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

/// How the terminal was, while it is raw.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// The terminal on stdin is raw until this is dropped.
pub(super) struct Raw(());

impl Raw {
    /// Makes the terminal on stdin raw.
    pub(super) fn enter() -> Result<Self> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let hook = std::panic::take_hook();
            // Before the message, whose lines would not begin at the left.
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                hook(panic);
            }));
        });
        set_raw().context("make the terminal raw")?;
        Ok(Self(()))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

fn set_raw() -> nix::Result<()> {
    let stdin = io::stdin();
    let before = tcgetattr(&stdin)?;
    let mut raw = before.clone();
    cfmakeraw(&mut raw);
    *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
    // At once: what is typed ahead is kept for the container.
    tcsetattr(&stdin, SetArg::TCSANOW, &raw)
}

fn restore() {
    // Whoever holds the lock is about to have set it, and does not panic.
    if let Ok(mut before) = BEFORE.try_lock()
        && let Some(before) = before.take()
    {
        // A terminal that has gone needs nothing.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &before);
    }
}

/// Whether there is a terminal for a process that gets one: to type at, if there is input, else to see.
pub(super) fn require(input: bool) -> Result<()> {
    let (has, what, hint) = match input {
        true => (io::stdin().is_terminal(), "stdin is not one", "; for a pipe use -i alone"),
        false => (io::stdout().is_terminal(), "stdout is not one", ""),
    };
    if !has {
        bail!("-t needs a terminal: {what}{hint}");
    }
    Ok(())
}

/// The size of the terminal, if there is one.
fn size() -> Option<Size> {
    let size = tcgetwinsize(io::stdout()).or_else(|_| tcgetwinsize(io::stdin())).ok()?;
    // A terminal of no size is one whose size nobody told.
    let known = size.ws_col > 0 && size.ws_row > 0;
    known.then_some(Size { width: size.ws_col, height: size.ws_row })
}

/// Follows the terminal: sends its size, at once and when it changes, and lets holdfast be stopped
/// (SIGTSTP) and go on, with the terminal as the shell and the container want it.
pub(super) struct Follower {
    sizes: mpsc::Sender<Size>,
    changed: Signal,
    stop: Signal,
    go_on: Signal,
    raw: bool,
}

impl Follower {
    /// Of a terminal that is raw or not.
    pub(super) fn new(raw: bool) -> Result<(Self, mpsc::Receiver<Size>)> {
        let (sizes, receiver) = mpsc::channel(1);
        let catch = |kind: SignalKind| signal(kind).context("catch signals");
        let follower = Self {
            sizes,
            changed: catch(SignalKind::window_change())?,
            stop: catch(SignalKind::from_raw(Number::SIGTSTP as i32))?,
            go_on: catch(SignalKind::from_raw(Number::SIGCONT as i32))?,
            raw,
        };
        Ok((follower, receiver))
    }

    /// Never ends.
    pub(super) async fn run(mut self) {
        loop {
            if let Some(size) = size() {
                // The session is over when nobody takes it.
                let _ = self.sizes.send(size).await;
            }
            tokio::select! {
                _ = self.changed.recv() => {}
                _ = self.stop.recv() => {
                    restore();
                    // This cannot be caught, so we stop here and now.
                    let _ = raise(Number::SIGSTOP);
                }
                _ = self.go_on.recv() => {
                    // The shell has set the terminal to what it likes.
                    if self.raw {
                        let _ = set_raw();
                    }
                }
            }
        }
    }
}

/// The signals that ask to end, with the terminal given back.
pub(super) struct Ends([(Signal, i32); 4]);

impl Ends {
    /// From now on they do not kill.
    pub(super) fn catch() -> Result<Self> {
        let catch = |number: Number| {
            let caught = signal(SignalKind::from_raw(number as i32));
            caught.map(|caught| (caught, number as i32)).context("catch signals")
        };
        Ok(Self([
            catch(Number::SIGINT)?,
            catch(Number::SIGTERM)?,
            catch(Number::SIGHUP)?,
            catch(Number::SIGQUIT)?,
        ]))
    }

    /// The next one's number.
    pub(super) async fn next(&mut self) -> i32 {
        let [(a, int), (b, term), (c, hup), (d, quit)] = &mut self.0;
        tokio::select! {
            _ = a.recv() => *int,
            _ = b.recv() => *term,
            _ = c.recv() => *hup,
            _ = d.recv() => *quit,
        }
    }
}
