//! Reading regular files by position. Invariant: an open [`File`] is a regular file whose length
//! was known when it was opened; a read either fills its buffer or is an error, also when the file
//! shrinks meanwhile. No mmap: a mapped file that shrinks, or a network disk that stalls, kills
//! the process with SIGBUS. Not for writing.

use crate::error::{Error, Result, Status, try_vec};
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// Longest path or file name in a message, in characters.
const SHOWN: usize = 96;

/// A regular file, open for reading.
#[derive(Debug)]
pub struct File {
    inner: fs::File,
    len: u64,
    name: String,
}

impl File {
    /// Opens a regular file. Never blocks: neither on a FIFO nor on a device.
    pub fn open(path: &Path) -> Result<File> {
        let refused = |e: &io::Error| Error::os(show(path), e);
        // Looked at before opening, because opening a device may already do something.
        check_regular(path, &fs::metadata(path).map_err(|e| refused(&e))?)?;
        let inner = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY)
            .open(path)
            .map_err(|e| refused(&e))?;
        // And again on what was really opened: the name may mean another file by now.
        let metadata = inner.metadata().map_err(|e| refused(&e))?;
        check_regular(path, &metadata)?;
        let name = path.file_name().map_or_else(|| show(path), |n| show(Path::new(n)));
        Ok(File { inner, len: metadata.len(), name })
    }

    /// Bytes when it was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it was empty when opened.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its name without folders, fit for a one-line message.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Fills `dst` from byte `offset` on, and checks that the file still has its length.
    pub fn read_at(&self, offset: u64, dst: &mut [u8]) -> Result<()> {
        read_fully(&self.name, offset, dst, |buf, at| self.inner.read_at(buf, at))?;
        let now = self.inner.metadata().map_err(|e| Error::os(&self.name, &e))?.len();
        if now != self.len {
            return Err(Error::new(
                Status::E_IO,
                format!(
                    "{}: {now} bytes now, {} when opened; the file is being changed",
                    self.name, self.len
                ),
            ));
        }
        Ok(())
    }

    /// The whole file, when it has at most `max` bytes.
    pub fn read_all(&self, max: u64) -> Result<Vec<u8>> {
        let len = usize::try_from(self.len).unwrap_or(usize::MAX);
        if self.len > max {
            return Err(Error::limit(format!(
                "{}: {} bytes stored, at most {max} allowed",
                self.name, self.len
            )));
        }
        let mut bytes = try_vec(len, 0u8, "file contents")?;
        self.read_at(0, &mut bytes)?;
        Ok(bytes)
    }
}

/// A path as one short line: control characters escaped, the end kept when it is long.
pub fn show(path: &Path) -> String {
    let text: String = path.to_string_lossy().chars().flat_map(escape).collect();
    let n = text.chars().count();
    if n <= SHOWN { text } else { format!("…{}", text.chars().skip(n - SHOWN).collect::<String>()) }
}

fn escape(c: char) -> impl Iterator<Item = char> {
    let escaped = c.is_control().then(|| c.escape_default());
    let plain = (!c.is_control()).then_some(c);
    escaped.into_iter().flatten().chain(plain)
}

fn check_regular(path: &Path, metadata: &fs::Metadata) -> Result<()> {
    let kind = metadata.file_type();
    if kind.is_file() {
        return Ok(());
    }
    let what = match kind {
        k if k.is_dir() => "a folder",
        k if k.is_fifo() => "a FIFO",
        k if k.is_socket() => "a socket",
        _ => "a device",
    };
    Err(Error::format(format!("{}: {what}, a regular file is needed", show(path))))
}

/// Calls `read(buffer, offset)` until `dst` is full. Interrupted calls are repeated; an end of file
/// before that is an error.
fn read_fully(
    name: &str,
    offset: u64,
    dst: &mut [u8],
    mut read: impl FnMut(&mut [u8], u64) -> io::Result<usize>,
) -> Result<()> {
    let wanted = dst.len();
    let mut done = 0;
    while done < wanted {
        match read(&mut dst[done..], offset.saturating_add(done as u64)) {
            Ok(0) => {
                return Err(Error::new(
                    Status::E_IO,
                    format!("{name}: file ends after {done} of {wanted} bytes from offset {offset}"),
                ));
            }
            Ok(n) => done += n.min(wanted - done),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::os(name, &e)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_interrupted_reads_are_continued() {
        let data: Vec<u8> = (0..100).collect();
        let mut calls = 0;
        let mut dst = [0u8; 50];
        read_fully("x", 10, &mut dst, |buf, at| {
            calls += 1;
            if calls % 3 == 0 {
                return Err(io::Error::from_raw_os_error(libc::EINTR));
            }
            let n = buf.len().min(7);
            buf[..n].copy_from_slice(&data[at as usize..at as usize + n]);
            Ok(n)
        })
        .unwrap();
        assert_eq!(dst, data[10..60]);
    }

    #[test]
    fn errno_and_early_end_are_reported() {
        for code in [libc::EIO, libc::ESTALE] {
            let e =
                read_fully("x", 0, &mut [0; 4], |_, _| Err(io::Error::from_raw_os_error(code))).unwrap_err();
            assert_eq!((e.status, e.os_code), (Status::E_IO, code));
        }
        let e = read_fully("x", 8, &mut [0; 4], |_, _| Ok(0)).unwrap_err();
        assert_eq!(e.status, Status::E_IO);
        assert_eq!(e.message, "x: file ends after 0 of 4 bytes from offset 8");
    }

    #[test]
    fn folders_and_devices_are_refused() {
        for (path, what) in [("/", "a folder"), ("/dev/null", "a device")] {
            let e = File::open(Path::new(path)).unwrap_err();
            assert_eq!(e.status, Status::E_FORMAT);
            assert!(e.message.contains(what), "{e}");
        }
        let e = File::open(Path::new("/no/such\nfile")).unwrap_err();
        assert_eq!((e.status, e.os_code), (Status::E_IO, libc::ENOENT));
        assert!(!e.message.contains('\n'), "{e}");
    }
}
