//! Sockets as the bench wants them: client sockets from many loopback addresses, and the bare servers' listener.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, listen, socket_with, sockopt};

/// The backlog of a bare server: more connections than this at once wait for a SYN to be sent again.
const BACKLOG: i32 = 4096;

/// Starts to connect to `target` without blocking; completion shows as writability. With `source` the socket is bound
/// to that address, and the kernel picks the port when it knows the whole tuple (IP_BIND_ADDRESS_NO_PORT), which is
/// what allows more connections than one address has ports.
pub(crate) fn start_connect(target: SocketAddrV4, source: Option<Ipv4Addr>) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    if let Some(source) = source {
        set_bind_address_no_port(&socket)?;
        bind(&socket, &SocketAddrV4::new(source, 0))?;
    }
    match connect(&socket, &target) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

fn set_bind_address_no_port(socket: &OwnedFd) -> Result<(), Errno> {
    let on: libc::c_int = 1;
    // SAFETY: the option takes an int; pointer and length describe `on`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL))
    }
}

/// A listener on a free port of 127.0.0.1 whose accepted sockets inherit TCP_NODELAY.
pub(crate) fn listen_on_loopback(nonblocking: bool) -> Result<(OwnedFd, SocketAddrV4), Errno> {
    let mut flags = SocketFlags::CLOEXEC;
    flags.set(SocketFlags::NONBLOCK, nonblocking);
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0))?;
    listen(&socket, BACKLOG)?;
    let address =
        SocketAddrV4::try_from(rustix::net::getsockname(&socket)?).map_err(|_| Errno::AFNOSUPPORT)?;
    Ok((socket, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connects_from_the_address_it_was_given() {
        let (listener, address) = listen_on_loopback(false).expect("a free port");
        let source = Ipv4Addr::new(127, 0, 3, 7);
        let _client = start_connect(address, Some(source)).expect("loopback");
        let (_accepted, peer) = rustix::net::acceptfrom(&listener).expect("the connection");
        let peer = SocketAddrV4::try_from(peer.expect("an address")).expect("IPv4");
        assert_eq!(*peer.ip(), source);
    }
}
