//! A bounded log of whole lines. No I/O: a host takes lines out ([`Log::drain`]) or gets each one
//! pushed ([`Log::set_sink`]). When the ring is full the oldest lines go, and are counted.

use crate::error::{Result, try_with_capacity};
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How important a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Something failed.
    Error = 1,
    /// Something is not as it should be, and work goes on.
    Warn = 2,
    /// Rare events: loads, creations.
    Info = 3,
    /// Refusals that are part of normal work.
    Debug = 4,
}

impl Level {
    fn tag(self) -> &'static str {
        match self {
            Level::Error => "error",
            Level::Warn => "warn",
            Level::Info => "info",
            Level::Debug => "debug",
        }
    }
}

/// Gets each line as it is written, without its end. Called with a lock held: it must not log.
pub type Sink = Box<dyn Fn(Level, &str) + Send>;

/// The log of one context.
pub struct Log {
    /// Lines above this are not written; `None` = nothing is.
    level: Option<Level>,
    state: Mutex<State>,
}

struct State {
    /// UTF-8 lines, each ended by `\n`.
    ring: VecDeque<u8>,
    capacity: usize,
    dropped: u64,
    sink: Option<Sink>,
}

/// A longer line is cut.
const MAX_LINE: usize = 1024;

/// What [`Log::drain`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// So many bytes were copied: whole lines, none when the log is empty.
    Bytes(usize),
    /// Not even the first line fits; it needs so many bytes.
    Needs(usize),
}

impl Log {
    /// A log that keeps up to `capacity` bytes of lines at most as detailed as `level`.
    pub fn new(level: Option<Level>, capacity: usize) -> Result<Log> {
        let capacity = capacity.max(2 * MAX_LINE);
        // One allocation here, so that logging itself never allocates and never fails.
        let ring = VecDeque::from(try_with_capacity(capacity + MAX_LINE, "log ring")?);
        Ok(Log { level, state: Mutex::new(State { ring, capacity, dropped: 0, sink: None }) })
    }

    /// Writes one line. Control characters, which hostile names may hold, become spaces.
    pub fn write(&self, level: Level, text: fmt::Arguments<'_>) {
        if self.level.is_none_or(|most| level > most) {
            return;
        }
        let mut line = Line { bytes: [0; MAX_LINE], len: 0 };
        // A line that does not fit is cut; that is not an error.
        let _ = fmt::write(&mut line, text);
        let mut state = self.lock();
        match &state.sink {
            Some(sink) => sink(level, line.text()),
            None => state.push(level, line.text()),
        }
    }

    /// Moves the oldest lines that fit into `out`.
    pub fn drain(&self, out: &mut [u8]) -> Drained {
        let mut state = self.lock();
        let mut end = 0;
        for (i, &byte) in state.ring.iter().enumerate() {
            if byte == b'\n' {
                if i + 1 > out.len() {
                    if end == 0 {
                        return Drained::Needs(i + 1);
                    }
                    break;
                }
                end = i + 1;
            }
        }
        for (to, from) in out.iter_mut().zip(state.ring.drain(..end)) {
            *to = from;
        }
        Drained::Bytes(end)
    }

    /// Lines that were lost because the ring was full.
    pub fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    /// Sends lines to `sink` from now on, or to the ring again. The old sink is not running any
    /// more when this returns.
    pub fn set_sink(&self, sink: Option<Sink>) {
        self.lock().sink = sink;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing here leaves the ring half written, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn push(&mut self, level: Level, text: &str) {
        let tag = level.tag();
        let need = tag.len() + ": \n".len() + text.len();
        while self.ring.len() + need > self.capacity && !self.ring.is_empty() {
            let line = self.ring.iter().position(|&b| b == b'\n').map_or(self.ring.len(), |end| end + 1);
            self.ring.drain(..line);
            self.dropped += 1;
        }
        for part in [tag, ": ", text, "\n"] {
            self.ring.extend(part.as_bytes());
        }
    }
}

/// A line being formatted, on the stack.
struct Line {
    bytes: [u8; MAX_LINE],
    len: usize,
}

impl Line {
    fn text(&self) -> &str {
        // Only whole characters are put in.
        std::str::from_utf8(&self.bytes[..self.len]).unwrap_or("")
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            let c = if c.is_control() { ' ' } else { c };
            if self.len + c.len_utf8() > MAX_LINE {
                return Err(fmt::Error);
            }
            self.len += c.encode_utf8(&mut self.bytes[self.len..]).len();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn drain(log: &Log) -> String {
        let mut out = [0; 8192];
        match log.drain(&mut out) {
            Drained::Bytes(n) => String::from_utf8(out[..n].to_vec()).expect("whole characters"),
            Drained::Needs(n) => panic!("{n} bytes wanted"),
        }
    }

    #[test]
    fn lines_come_out_in_order_once() {
        let log = Log::new(Some(Level::Info), 0).expect("small");
        log.write(Level::Info, format_args!("one"));
        log.write(Level::Debug, format_args!("too detailed"));
        log.write(Level::Error, format_args!("two\nthree"));
        assert_eq!(drain(&log), "info: one\nerror: two three\n");
        assert_eq!(drain(&log), "");
    }

    #[test]
    fn only_whole_lines_are_copied() {
        let log = Log::new(Some(Level::Debug), 0).expect("small");
        log.write(Level::Warn, format_args!("a"));
        log.write(Level::Warn, format_args!("b"));
        assert_eq!(log.drain(&mut [0; 7]), Drained::Needs(8));
        assert_eq!(log.drain(&mut [0; 15]), Drained::Bytes(8));
        assert_eq!(drain(&log), "warn: b\n");
    }

    #[test]
    fn a_full_ring_drops_the_oldest_and_counts() {
        let log = Log::new(Some(Level::Debug), 0).expect("small");
        for i in 0..1000 {
            log.write(Level::Info, format_args!("line {i:04}"));
        }
        let text = drain(&log);
        assert!(text.ends_with("line 0999\n") && text.starts_with("info: line "));
        assert_eq!(log.dropped() + text.lines().count() as u64, 1000);
    }

    #[test]
    fn a_long_line_is_cut_at_a_character() {
        let log = Log::new(Some(Level::Debug), 0).expect("small");
        log.write(Level::Info, format_args!("{}", "ü".repeat(MAX_LINE)));
        assert_eq!(drain(&log).chars().filter(|&c| c == 'ü').count(), MAX_LINE / 2);
    }

    #[test]
    fn a_sink_gets_lines_instead_of_the_ring() {
        let log = Log::new(Some(Level::Debug), 0).expect("small");
        let seen = Arc::new(Mutex::new(Vec::new()));
        let copy = Arc::clone(&seen);
        log.set_sink(Some(Box::new(move |level, text| {
            copy.lock().expect("no panic").push((level, text.to_owned()));
        })));
        log.write(Level::Warn, format_args!("pushed"));
        log.set_sink(None);
        log.write(Level::Warn, format_args!("kept"));
        assert_eq!(*seen.lock().expect("no panic"), [(Level::Warn, "pushed".to_owned())]);
        assert_eq!(drain(&log), "warn: kept\n");
    }

    #[test]
    fn off_writes_nothing() {
        let log = Log::new(None, 0).expect("small");
        log.write(Level::Error, format_args!("x"));
        assert_eq!(drain(&log), "");
    }
}
