//! The program's code in memory before the first connection comes.
//!
//! Owns one advice to the kernel. Without it the first thousand connections fault the code in page by page,
//! and pay for it in time and in the account of memory per connection.

use std::io::{BufRead, BufReader};

/// `MADV_POPULATE_READ` (madvise(2), since Linux 5.14).
const POPULATE_READ: libc::c_int = 22;

/// Maps the pages of this program's code. Best effort: where it fails, pages come when they are needed.
pub fn prefault_code() {
    let Ok(maps) = std::fs::File::open("/proc/self/maps") else { return };
    let Ok(program) = std::env::current_exe() else { return };
    let program = program.to_string_lossy();
    for line in BufReader::new(maps).lines().map_while(Result::ok) {
        let Some((start, len)) = code_of(&line, &program) else { continue };
        // SAFETY: populating for reading changes no contents; the range is a mapping of this process, and one
        // that is gone by now makes the call fail.
        unsafe { libc::madvise(start as *mut libc::c_void, len, POPULATE_READ) };
    }
}

/// Address and length of a line of `/proc/self/maps`, if it is executable code of `program`.
fn code_of(line: &str, program: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    if fields.next()? != "r-xp" || !line.ends_with(program) {
        return None;
    }
    let start = usize::from_str_radix(start, 16).ok()?;
    let end = usize::from_str_radix(end, 16).ok()?;
    Some((start, end.checked_sub(start)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_executable_code_of_the_program_counts() {
        let line = "5642bd532000-5642bda28000 r-xp 00159000 fe:00 123   /opt/ringmain";
        assert_eq!(code_of(line, "/opt/ringmain"), Some((0x5642_bd53_2000, 0x4f_6000)));
        assert_eq!(code_of(line, "/opt/other"), None);
        assert_eq!(code_of(&line.replace("r-xp", "r--p"), "/opt/ringmain"), None);
        assert_eq!(code_of("", "/opt/ringmain"), None);
    }
}
