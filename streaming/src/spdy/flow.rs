//! SPDY/3.1 windows: how much we may send, and what we have to grant.
//!
//! Kubernetes' own SPDY library (moby/spdystream: kubelet, API server, kubectl, crictl) neither sends
//! WINDOW_UPDATE nor keeps to windows. A server that waited for its updates would stand still after
//! 64 KiB. So windows bind us from the moment when a peer shows that it has them (a SETTINGS with an
//! initial window, or a WINDOW_UPDATE); before that TCP alone holds us back. What is sent is counted
//! from the start, so the windows are right when they begin to matter.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::sync::Notify;

use crate::pipe::Consumed;

/// The window of a stream, and of a session, at its start.
pub(crate) const INITIAL: u32 = 64 * 1024;
/// What may wait for the backend on all streams of a session together: the session's window. A peer
/// without windows is not read while so much waits.
pub(crate) const SESSION: u32 = 8 * 1024 * 1024;
const MAX: i64 = i32::MAX as i64;

/// A window that would exceed 2^31 - 1, or an update by nothing.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct BadUpdate;

struct Window {
    credit: i64,
    waiting: Option<Waker>,
}

struct Windows {
    /// Whether the peer has shown that it has windows.
    honoured: bool,
    session: i64,
    initial: i64,
    streams: HashMap<u32, Window>,
    ended: bool,
}

/// What we may send.
pub(crate) struct SendWindows(Mutex<Windows>);

impl SendWindows {
    pub(crate) fn new() -> Self {
        let initial = i64::from(INITIAL);
        let streams = HashMap::new();
        Self(Mutex::new(Windows {
            honoured: false,
            session: initial,
            initial,
            streams,
            ended: false,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Windows> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn open(&self, stream: u32) {
        let mut windows = self.lock();
        let credit = windows.initial;
        windows.streams.insert(stream, Window { credit, waiting: None });
    }

    /// Forgets a stream; who waits for its window gets an error.
    pub(crate) fn remove(&self, stream: u32) {
        let window = self.lock().streams.remove(&stream);
        window.and_then(|window| window.waiting).into_iter().for_each(Waker::wake);
    }

    /// The connection is gone: nobody may wait any longer.
    pub(crate) fn end(&self) {
        let mut windows = self.lock();
        windows.ended = true;
        windows.wake_all();
    }

    /// Takes up to `want` (more than 0) from the windows of a stream and of the session.
    pub(crate) fn poll_take(
        &self,
        stream: u32,
        want: usize,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let mut windows = self.lock();
        let Windows { honoured, session, streams, ended, .. } = &mut *windows;
        let Some(window) = streams.get_mut(&stream).filter(|_| !*ended) else {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        };
        let mut grant = want as i64;
        if *honoured {
            grant = grant.min(window.credit).min(*session);
            if grant <= 0 {
                window.waiting = Some(cx.waker().clone());
                return Poll::Pending;
            }
        }
        window.credit -= grant;
        *session -= grant;
        Poll::Ready(Ok(grant as usize))
    }

    /// A WINDOW_UPDATE of the peer; stream 0 is the session. An unknown stream has ended meanwhile.
    pub(crate) fn update(&self, stream: u32, delta: u32) -> Result<(), BadUpdate> {
        let mut windows = self.lock();
        windows.honoured = true;
        let grow = |credit: i64| match credit + i64::from(delta) {
            sum if delta > 0 && sum <= MAX => Ok(sum),
            _ => Err(BadUpdate),
        };
        if stream == 0 {
            windows.session = grow(windows.session)?;
            windows.wake_all();
        } else if let Some(window) = windows.streams.get_mut(&stream) {
            window.credit = grow(window.credit)?;
            window.waiting.take().into_iter().for_each(Waker::wake);
        }
        Ok(())
    }

    /// The peer's SETTINGS give another initial window, which changes the open ones too.
    pub(crate) fn initial(&self, size: u32) {
        let mut windows = self.lock();
        windows.honoured = true;
        let change = i64::from(size) - windows.initial;
        windows.initial = i64::from(size);
        windows.streams.values_mut().for_each(|window| window.credit += change);
        windows.wake_all();
    }
}

impl Windows {
    fn wake_all(&mut self) {
        let waiting = self.streams.values_mut().filter_map(|window| window.waiting.take());
        waiting.for_each(Waker::wake);
    }
}

struct Granting {
    /// Consumed and not yet granted again, by stream; 0 is the session.
    owed: BTreeMap<u32, u32>,
    /// Bytes that wait in the pipes of the session.
    waiting: usize,
}

/// What the peer may send: consumed bytes are granted again once they are half a window.
pub(crate) struct Grants {
    state: Mutex<Granting>,
    /// The connection's writer waits for it.
    pub(crate) due: Notify,
    /// The connection's reader waits for it, when the session's buffers are full.
    room: Notify,
}

impl Grants {
    pub(crate) fn new() -> Arc<Self> {
        let state = Mutex::new(Granting { owed: BTreeMap::new(), waiting: 0 });
        Arc::new(Self { state, due: Notify::new(), room: Notify::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Granting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts bytes that have arrived.
    pub(crate) fn arrived(&self, bytes: usize) {
        self.lock().waiting += bytes;
    }

    /// Waits until the session's buffers have room.
    pub(crate) async fn room(&self) {
        loop {
            let changed = self.room.notified();
            if self.has_room() {
                return;
            }
            changed.await;
        }
    }

    pub(crate) fn has_room(&self) -> bool {
        self.lock().waiting < SESSION as usize
    }

    fn consumed(&self, stream: u32, bytes: usize) {
        let mut state = self.lock();
        state.waiting = state.waiting.saturating_sub(bytes);
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let mut due = false;
        for (id, window) in [(stream, INITIAL), (0, SESSION)] {
            let owed = state.owed.entry(id).or_default();
            *owed = owed.saturating_add(bytes).min(i32::MAX as u32);
            due |= *owed >= window / 2;
        }
        drop(state);
        self.room.notify_one();
        if due {
            self.due.notify_one();
        }
    }

    /// The updates that are due; each is given once.
    pub(crate) fn take_due(&self, mut each: impl FnMut(u32, u32)) {
        self.lock().owed.retain(|&stream, &mut delta| {
            let window = if stream == 0 { SESSION } else { INITIAL };
            let due = delta >= window / 2;
            if due {
                each(stream, delta);
            }
            !due
        });
    }
}

/// One stream's pipe tells the session's grants.
pub(crate) struct StreamGrants {
    pub(crate) stream: u32,
    pub(crate) grants: Arc<Grants>,
}

impl Drop for StreamGrants {
    fn drop(&mut self) {
        // The pipe is gone, and with it all that could be granted for it.
        self.grants.lock().owed.remove(&self.stream);
    }
}

impl Consumed for StreamGrants {
    fn consumed(&self, bytes: usize) {
        self.grants.consumed(self.stream, bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use proptest::prelude::*;

    use super::*;

    fn take(windows: &SendWindows, stream: u32, want: usize) -> Option<usize> {
        match windows.poll_take(stream, want, &mut Context::from_waker(Waker::noop())) {
            Poll::Ready(result) => Some(result.unwrap()),
            Poll::Pending => None,
        }
    }

    #[test]
    fn a_peer_without_windows_is_never_waited_for() {
        let windows = SendWindows::new();
        windows.open(1);
        for _ in 0..100 {
            assert_eq!(take(&windows, 1, 32768), Some(32768));
        }
    }

    #[test]
    fn a_peer_with_windows_is() {
        let windows = SendWindows::new();
        windows.initial(1000);
        windows.open(1);
        windows.open(3);
        assert_eq!(take(&windows, 1, 600), Some(600));
        assert_eq!(take(&windows, 1, 600), Some(400));
        assert_eq!(take(&windows, 1, 600), None);
        assert_eq!(take(&windows, 3, 1), Some(1));
        windows.update(1, 5).unwrap();
        assert_eq!(take(&windows, 1, 600), Some(5));
        // A smaller initial window makes open ones negative: they have to be filled up first.
        windows.initial(10);
        windows.update(1, 990).unwrap();
        assert_eq!(take(&windows, 1, 600), None);
        windows.update(1, 1).unwrap();
        assert_eq!(take(&windows, 1, 600), Some(1));
    }

    #[test]
    fn the_session_has_a_window_of_its_own() {
        let windows = SendWindows::new();
        windows.initial(1 << 20);
        windows.open(1);
        windows.open(3);
        assert_eq!(take(&windows, 1, 1 << 20), Some(INITIAL as usize));
        assert_eq!(take(&windows, 3, 1), None);
        windows.update(0, 10).unwrap();
        assert_eq!(take(&windows, 3, 100), Some(10));
    }

    #[test]
    fn updates_that_cannot_be_are_refused() {
        let windows = SendWindows::new();
        windows.open(1);
        assert_eq!(windows.update(1, 0), Err(BadUpdate));
        assert_eq!(windows.update(1, i32::MAX as u32), Err(BadUpdate));
        assert_eq!(windows.update(0, i32::MAX as u32), Err(BadUpdate));
        assert_eq!(windows.update(99, 1), Ok(()));
    }

    #[test]
    fn consumed_bytes_are_granted_again_in_halves() {
        let grants = Grants::new();
        let due = || {
            let mut list = Vec::new();
            grants.take_due(|stream, delta| list.push((stream, delta)));
            list
        };
        grants.consumed(5, 32767);
        assert_eq!(due(), []);
        grants.consumed(5, 1);
        assert_eq!(due(), [(5, 32768)]);
        assert_eq!(due(), []);
        for _ in 0..127 {
            grants.consumed(7, 32768);
        }
        assert_eq!(due(), [(0, 128 * 32768), (7, 127 * 32768)]);
    }

    proptest! {
        /// Against the plainest model: what is taken never exceeds what was granted.
        #[test]
        fn never_more_than_granted(
            steps in proptest::collection::vec((0u32..3, 1u32..5000, any::<bool>()), 0..200),
        ) {
            let windows = SendWindows::new();
            windows.initial(2000);
            let mut granted = [i64::from(INITIAL), 2000, 2000];
            let mut taken = [0i64; 3];
            windows.open(1);
            windows.open(2);
            for (stream, amount, take_it) in steps {
                if take_it && stream > 0 {
                    let got = take(&windows, stream, amount as usize).unwrap_or(0) as i64;
                    taken[stream as usize] += got;
                    taken[0] += got;
                    let left = (granted[stream as usize] - taken[stream as usize] + got)
                        .min(granted[0] - taken[0] + got);
                    prop_assert_eq!(got, left.min(i64::from(amount)));
                } else {
                    windows.update(stream, amount).unwrap();
                    granted[stream as usize] += i64::from(amount);
                }
            }
        }
    }
}
