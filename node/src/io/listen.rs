//! Listeners: what `--listen` means, and binding it for every shard.
//!
//! Owns the grammar of listen specifications, the options that accepted sockets inherit, and the check
//! that nobody else holds a port. It knows nothing of what is served.
//!
//! A TCP address is bound once per shard with `SO_REUSEPORT`, after it was bound once without: a stale
//! second node is named instead of silently taking half the traffic. Unix sockets know no
//! `SO_REUSEPORT`: all shards accept from one listening socket, and the kernel wakes one of them per
//! connection, so their share of connections is whatever the wake order gives. A socket file left by a
//! dead process is replaced; the file is removed when the last shard lets go of it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, getsockname, listen, socket_with, sockopt,
};

/// Sockets listened on per shard at the most, port ranges counted in full. 1,024 ports behind one
/// proxy address are 64 million connections.
pub const LISTENERS_MAX: usize = 1_024;

/// Where to listen, as in `--listen`: `127.0.0.1:8000`, `[::1]:8000`, `0.0.0.0:8000-8003` or
/// `unix:/run/ringmain.sock`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenSpec {
    /// An address and a range of ports, both ends included. Port 0 alone: any free port.
    Tcp {
        /// The local address.
        ip: IpAddr,
        /// The first port.
        first: u16,
        /// The last port.
        last: u16,
    },
    /// A unix stream socket at this path.
    Unix(PathBuf),
}

impl ListenSpec {
    /// Listening sockets of a shard that it stands for.
    pub fn sockets(&self) -> usize {
        match self {
            Self::Tcp { first, last, .. } => usize::from(last - first) + 1,
            Self::Unix(_) => 1,
        }
    }
}

/// Why a `--listen` value was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseListenError {
    /// Neither of the known shapes.
    #[error("{0:?} is not an address: write 127.0.0.1:8000, [::1]:8000, 0.0.0.0:8000-8003 or unix:/path")]
    Shape(String),
    /// A range that ends before it begins, or starts at 0.
    #[error("{0:?} is not a range of ports: the first must be at least 1 and at most the last")]
    Range(String),
    /// More ports than [`LISTENERS_MAX`].
    #[error("{0:?} names more than {LISTENERS_MAX} ports")]
    TooMany(String),
    /// A unix path longer than the kernel takes, or an empty one.
    #[error("{0:?} is not a path for a unix socket: 1 to 107 bytes")]
    Path(String),
}

impl FromStr for ListenSpec {
    type Err = ParseListenError;

    fn from_str(text: &str) -> Result<Self, ParseListenError> {
        if let Some(path) = text.strip_prefix("unix:") {
            // sockaddr_un holds 108 bytes, the last one is NUL (unix(7)).
            let fits = (1..=107).contains(&path.len()) && !path.contains('\0');
            return if fits { Ok(Self::Unix(path.into())) } else { Err(ParseListenError::Path(text.into())) };
        }
        let shape = || ParseListenError::Shape(text.into());
        let (host, ports) = text.rsplit_once(':').ok_or_else(shape)?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let ip: IpAddr = host.parse().map_err(|_| shape())?;
        if ip.is_ipv6() && !text.starts_with('[') {
            return Err(shape());
        }
        let (first, last) = match ports.split_once('-') {
            Some((first, last)) => (first.parse().map_err(|_| shape())?, last.parse().map_err(|_| shape())?),
            None => {
                let port = ports.parse().map_err(|_| shape())?;
                (port, port)
            }
        };
        if last < first || (first == 0 && last != 0) {
            return Err(ParseListenError::Range(text.into()));
        }
        if usize::from(last - first) >= LISTENERS_MAX {
            return Err(ParseListenError::TooMany(text.into()));
        }
        Ok(Self::Tcp { ip, first, last })
    }
}

impl fmt::Display for ListenSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { ip, first, last } => {
                write!(f, "{}", SocketAddr::new(*ip, *first))?;
                if first == last { Ok(()) } else { write!(f, "-{last}") }
            }
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// What accepted sockets inherit from their listener. Sizes in bytes, as asked for: the kernel doubles
/// buffer sizes for its own bookkeeping.
#[derive(Clone, Debug)]
pub struct SocketOptions {
    /// `SO_SNDBUF`: what a stopped reader may hold in the kernel. Autotuning would make it megabytes.
    pub send_buffer_bytes: u32,
    /// `SO_RCVBUF`.
    pub receive_buffer_bytes: u32,
    /// `TCP_NOTSENT_LOWAT`: a socket is writable again when less than this is unsent.
    pub notsent_lowat_bytes: u32,
    /// `TCP_USER_TIMEOUT`: a peer that acknowledges nothing for this long is gone.
    pub user_timeout_ms: u32,
    /// Connections that wait to be accepted, per listener; the kernel caps it by `net.core.somaxconn`.
    pub backlog: u32,
}

impl Default for SocketOptions {
    fn default() -> Self {
        Self {
            send_buffer_bytes: 64 * 1024,
            receive_buffer_bytes: 32 * 1024,
            notsent_lowat_bytes: 32 * 1024,
            user_timeout_ms: 30_000,
            backlog: 4_096,
        }
    }
}

/// An address that is listened on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BoundAddress {
    /// A TCP address with its real port.
    Tcp(SocketAddr),
    /// A unix socket.
    Unix(PathBuf),
}

impl fmt::Display for BoundAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A process that holds a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its id.
    pub pid: u32,
    /// Its name (`/proc/PID/comm`).
    pub name: String,
}

/// Why a listener could not be had. None of them mends itself by a retry.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody else listens there.
    #[error("{address} is already in use{}", holder_text(.holder.as_ref()))]
    InUse {
        /// The address asked for.
        address: BoundAddress,
        /// Who holds it, where `/proc` tells (it needs the same user, or root).
        holder: Option<Holder>,
    },
    /// The address belongs to no interface of this machine.
    #[error("{0} is not an address of this machine")]
    NoSuchAddress(BoundAddress),
    /// A port below `net.ipv4.ip_unprivileged_port_start`, or a directory that may not be written to.
    #[error("no permission to listen on {0}: take a port above 1023, or grant CAP_NET_BIND_SERVICE")]
    Permission(BoundAddress),
    /// More sockets than [`LISTENERS_MAX`].
    #[error("more than {LISTENERS_MAX} listeners: use fewer ports")]
    TooMany,
    /// Anything else that the kernel says.
    #[error("cannot listen on {address}: {step}: {error}")]
    Kernel {
        /// The address asked for.
        address: BoundAddress,
        /// The call that failed.
        step: &'static str,
        /// What the kernel said.
        error: std::io::Error,
    },
}

fn holder_text(holder: Option<&Holder>) -> String {
    match holder {
        Some(holder) => format!(
            " by process {} ({}): stop it (kill {}) or listen elsewhere",
            holder.pid, holder.name, holder.pid
        ),
        None => ": find the process with `ss -ltnp` as root, or listen elsewhere".into(),
    }
}

/// The listeners of a node: for every shard one socket per address.
#[derive(Debug)]
pub struct Listeners {
    shards: Vec<Vec<ShardListener>>,
    addresses: Vec<BoundAddress>,
}

/// One listening socket of one shard.
#[derive(Debug)]
pub struct ShardListener {
    fd: Arc<OwnedFd>,
    /// Which of the given specifications it belongs to: what the engine is told at every accept.
    pub spec_index: u16,
    /// Keeps the socket file until the last shard lets go.
    _file: Option<Arc<SocketFile>>,
}

impl AsFd for ShardListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for ShardListener {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Removes a unix socket's file when dropped.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Already gone, or not ours to remove: nothing to do about either.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Listeners {
    /// Binds every specification for `shards` shards. The kernel queues connections from now on.
    pub fn bind(specs: &[ListenSpec], options: &SocketOptions, shards: u16) -> Result<Self, ListenError> {
        let mut bound = Self { shards: (0..shards).map(|_| Vec::new()).collect(), addresses: Vec::new() };
        for (spec_index, spec) in specs.iter().enumerate() {
            let spec_index = u16::try_from(spec_index).map_err(|_| ListenError::TooMany)?;
            match spec {
                ListenSpec::Tcp { ip, first, last } => {
                    for port in *first..=*last {
                        bound.bind_tcp(SocketAddr::new(*ip, port), spec_index, options)?;
                    }
                }
                ListenSpec::Unix(path) => bound.bind_unix(path, spec_index, options)?,
            }
        }
        Ok(bound)
    }

    /// What is listened on, in the order of the specifications, with real ports.
    pub fn addresses(&self) -> &[BoundAddress] {
        &self.addresses
    }

    /// Takes the listeners of one shard; empty the second time.
    pub fn take(&mut self, shard: u16) -> Vec<ShardListener> {
        std::mem::take(&mut self.shards[usize::from(shard)])
    }

    fn bind_tcp(
        &mut self,
        address: SocketAddr,
        spec: u16,
        options: &SocketOptions,
    ) -> Result<(), ListenError> {
        self.check_room(1)?;
        if address.port() != 0 {
            claim_alone(address)?;
        }
        let mut address = address;
        for shard in &mut self.shards {
            let fd = listen_tcp(address, options)?;
            if address.port() == 0 {
                // The kernel gives a port that nobody shares; the other shards join this one.
                address = local_address(&fd, address)?;
            }
            shard.push(ShardListener { fd: Arc::new(fd), spec_index: spec, _file: None });
        }
        self.addresses.push(BoundAddress::Tcp(address));
        Ok(())
    }

    fn bind_unix(&mut self, path: &Path, spec: u16, options: &SocketOptions) -> Result<(), ListenError> {
        self.check_room(1)?;
        let address = BoundAddress::Unix(path.to_owned());
        let at = |step| move |error: Errno| explain(BoundAddress::Unix(path.to_owned()), step, error);
        let name = SocketAddrUnix::new(path).map_err(at("address"))?;
        remove_stale_socket(path, &name)?;
        let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(at("socket"))?;
        sockopt::set_socket_send_buffer_size(&fd, options.send_buffer_bytes as usize)
            .map_err(at("SO_SNDBUF"))?;
        bind(&fd, &name).map_err(at("bind"))?;
        let file = Arc::new(SocketFile(path.to_owned()));
        listen(&fd, options.backlog as i32).map_err(at("listen"))?;
        let fd = Arc::new(fd);
        for shard in &mut self.shards {
            let (fd, file) = (fd.clone(), Some(file.clone()));
            shard.push(ShardListener { fd, spec_index: spec, _file: file });
        }
        self.addresses.push(address);
        Ok(())
    }

    fn check_room(&self, more: usize) -> Result<(), ListenError> {
        if self.addresses.len() + more > LISTENERS_MAX { Err(ListenError::TooMany) } else { Ok(()) }
    }
}

/// Binds `address` without `SO_REUSEPORT` and lets it go again: fails if anybody listens there. Between this and the shards' own binding another process of the same user might
/// still come; a node that was there before cannot be missed.
fn claim_alone(address: SocketAddr) -> Result<(), ListenError> {
    let at = |step| move |error: Errno| explain(BoundAddress::Tcp(address), step, error);
    let fd = tcp_socket(address).map_err(at("socket"))?;
    bind(&fd, &address).map_err(at("bind"))?;
    // SO_REUSEADDR lets two bound sockets share a port until one listens: so listen.
    listen(&fd, 1).map_err(at("listen"))
}

fn local_address(fd: &OwnedFd, asked: SocketAddr) -> Result<SocketAddr, ListenError> {
    let name = getsockname(fd).and_then(SocketAddr::try_from);
    name.map_err(|error| explain(BoundAddress::Tcp(asked), "getsockname", error))
}

fn listen_tcp(address: SocketAddr, options: &SocketOptions) -> Result<OwnedFd, ListenError> {
    let at = |step| move |error: Errno| explain(BoundAddress::Tcp(address), step, error);
    let fd = tcp_socket(address).map_err(at("socket"))?;
    sockopt::set_socket_reuseport(&fd, true).map_err(at("SO_REUSEPORT"))?;
    sockopt::set_tcp_nodelay(&fd, true).map_err(at("TCP_NODELAY"))?;
    sockopt::set_socket_send_buffer_size(&fd, options.send_buffer_bytes as usize).map_err(at("SO_SNDBUF"))?;
    sockopt::set_socket_recv_buffer_size(&fd, options.receive_buffer_bytes as usize)
        .map_err(at("SO_RCVBUF"))?;
    sockopt::set_tcp_user_timeout(&fd, options.user_timeout_ms).map_err(at("TCP_USER_TIMEOUT"))?;
    set_notsent_lowat(&fd, options.notsent_lowat_bytes).map_err(at("TCP_NOTSENT_LOWAT"))?;
    bind(&fd, &address).map_err(at("bind"))?;
    listen(&fd, i32::try_from(options.backlog).unwrap_or(i32::MAX)).map_err(at("listen"))?;
    Ok(fd)
}

fn tcp_socket(address: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let fd = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // Connections of an earlier run in TIME_WAIT must not keep the port.
    sockopt::set_socket_reuseaddr(&fd, true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&fd, true)?;
    }
    Ok(fd)
}

fn set_notsent_lowat(fd: &OwnedFd, bytes: u32) -> Result<(), Errno> {
    // SAFETY: the option's value is four bytes that live for the call, and the length says so.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_NOTSENT_LOWAT,
            (&raw const bytes).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}

/// Removes a socket file that nobody listens on any more; one that is alive is an error.
fn remove_stale_socket(path: &Path, name: &SocketAddrUnix) -> Result<(), ListenError> {
    let address = || BoundAddress::Unix(path.to_owned());
    let is_socket = |meta: std::fs::Metadata| std::os::unix::fs::FileTypeExt::is_socket(&meta.file_type());
    match std::fs::symlink_metadata(path).map(is_socket) {
        Err(_) => Ok(()),
        Ok(false) => Err(ListenError::InUse { address: address(), holder: None }),
        Ok(true) => {
            let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(|error| explain(address(), "socket", error))?;
            match rustix::net::connect(&probe, name) {
                Err(Errno::CONNREFUSED) => std::fs::remove_file(path).map_err(|error| ListenError::Kernel {
                    address: address(),
                    step: "removing the stale socket file",
                    error,
                }),
                _ => Err(ListenError::InUse { address: address(), holder: None }),
            }
        }
    }
}

fn explain(address: BoundAddress, step: &'static str, error: Errno) -> ListenError {
    match error {
        Errno::ADDRINUSE => {
            let holder = match &address {
                BoundAddress::Tcp(address) => super::holder::holder_of(address.port()),
                BoundAddress::Unix(_) => None,
            };
            ListenError::InUse { address, holder }
        }
        Errno::ADDRNOTAVAIL => ListenError::NoSuchAddress(address),
        Errno::ACCESS | Errno::PERM => ListenError::Permission(address),
        other => ListenError::Kernel { address, step, error: other.into() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specifications_are_parsed_and_shown_again() {
        let check = |text: &str| assert_eq!(text.parse::<ListenSpec>().unwrap().to_string(), text);
        check("127.0.0.1:8000");
        check("127.0.0.1:0");
        check("0.0.0.0:8000-8003");
        check("[::1]:8000");
        check("[::]:8000-8001");
        check("unix:/run/ringmain.sock");
        let same = "127.0.0.1:8000-8000".parse::<ListenSpec>().unwrap();
        assert_eq!(same.to_string(), "127.0.0.1:8000");
    }

    #[test]
    fn other_specifications_are_refused() {
        type Kind = fn(String) -> ParseListenError;
        let check = |text: &str, kind: Kind| {
            assert_eq!(text.parse::<ListenSpec>(), Err(kind(text.into())), "{text}");
        };
        check("", ParseListenError::Shape);
        check("8000", ParseListenError::Shape);
        check("localhost:8000", ParseListenError::Shape);
        check("::1:8000", ParseListenError::Shape);
        check("127.0.0.1:", ParseListenError::Shape);
        check("127.0.0.1:65536", ParseListenError::Shape);
        check("127.0.0.1:1-2-3", ParseListenError::Shape);
        check("127.0.0.1:8003-8000", ParseListenError::Range);
        check("127.0.0.1:0-8000", ParseListenError::Range);
        check("127.0.0.1:1-1025", ParseListenError::TooMany);
        assert!("127.0.0.1:1-1024".parse::<ListenSpec>().is_ok());
        check("unix:", ParseListenError::Path);
        check(&format!("unix:/{}", "x".repeat(107)), ParseListenError::Path);
        assert!(format!("unix:/{}", "x".repeat(106)).parse::<ListenSpec>().is_ok());
    }

    #[test]
    fn every_shard_gets_a_socket_of_the_same_port() {
        let spec = "127.0.0.1:0".parse().unwrap();
        let mut listeners = Listeners::bind(&[spec], &SocketOptions::default(), 3).unwrap();
        let BoundAddress::Tcp(address) = listeners.addresses()[0] else { panic!("a TCP address") };
        assert_ne!(address.port(), 0);
        for shard in 0..3 {
            let mine = listeners.take(shard);
            assert_eq!(mine.len(), 1);
            let name = SocketAddr::try_from(getsockname(&mine[0].fd).unwrap()).unwrap();
            assert_eq!(name, address);
            let fd = &mine[0].fd;
            assert!(sockopt::tcp_nodelay(fd).unwrap());
            assert_eq!(sockopt::socket_send_buffer_size(fd).unwrap(), 2 * 64 * 1024);
            assert_eq!(sockopt::tcp_user_timeout(fd).unwrap(), 30_000);
            assert!(listeners.take(shard).is_empty());
        }
    }

    #[test]
    fn a_port_in_use_names_its_holder() {
        // A stale node listens with SO_REUSEPORT: binding beside it would succeed silently.
        let spec: ListenSpec = "127.0.0.1:0".parse().unwrap();
        let stale = Listeners::bind(&[spec], &SocketOptions::default(), 1).unwrap();
        let again = stale.addresses()[0].to_string().parse().unwrap();
        let error = Listeners::bind(&[again], &SocketOptions::default(), 1).unwrap_err();
        let ListenError::InUse { holder: Some(holder), .. } = &error else { panic!("{error}") };
        assert_eq!(holder.pid, std::process::id());
        assert!(error.to_string().contains(&format!("kill {}", holder.pid)), "{error}");
    }

    #[test]
    fn an_address_of_another_machine_is_named() {
        let spec = "192.0.2.1:8000".parse().unwrap();
        let error = Listeners::bind(&[spec], &SocketOptions::default(), 1).unwrap_err();
        assert!(matches!(error, ListenError::NoSuchAddress(_)), "{error}");
    }

    #[test]
    fn a_stale_socket_file_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let spec = ListenSpec::Unix(path.clone());
        // Dropping the std listener leaves its file behind, as a killed process does.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let live = Listeners::bind(std::slice::from_ref(&spec), &SocketOptions::default(), 2).unwrap();
        let error = Listeners::bind(&[spec], &SocketOptions::default(), 2).unwrap_err();
        assert!(matches!(error, ListenError::InUse { .. }), "{error}");
        assert!(path.exists());
        drop(live);
        assert!(!path.exists());
    }
}
