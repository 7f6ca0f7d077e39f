//! One connection to a server: dialed, greeted, framed.
//!
//! Owns: sockets, TLS, credentials on the wire, the outgoing buffer. Must not know: channels, scripts, topology.
//! Nothing is sent twice and nothing is retried here. Dropping a [`Connection`] closes it.
//!
//! Invariant: reading never waits for writing (a task of its own writes), so that a server that waits for us to read
//! is always read.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use redis::{Cmd, Value, ValueCodec};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto};
use tokio_util::codec::FramedRead;

use crate::redis::options::{Address, Credentials, RedisOptions, Tls};

/// Longest time for dialing and greeting, each.
pub(super) const DIAL_MAX: Duration = Duration::from_millis(1_000);

/// Bytes that wait to be written; above it a server that does not read is given up.
pub(super) const OUTGOING_BYTES_MAX: usize = 64 << 20;

/// Room that stays when all is written.
const OUTGOING_BYTES_KEPT: usize = 256 << 10;

const READ_BUFFER_BYTES: usize = 64 << 10;

/// Why a connection failed. Dialing again is safe; what was sent may have been done.
#[derive(Debug, thiserror::Error)]
pub(super) enum WireError {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("no answer in time")]
    Slow,
    #[error("closed by the server")]
    Closed,
    #[error("not what a server says: {0}")]
    Protocol(String),
    #[error("refused: {0}")]
    Refused(String),
    #[error("TLS: {0}")]
    Tls(String),
}

trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Stream for T {}

type AnyStream = Box<dyn Stream>;

#[derive(Default)]
struct Outgoing {
    bytes: RefCell<Vec<u8>>,
    wake: Notify,
    failed: Cell<bool>,
}

/// A connection. RESP3: pushes and answers come mixed, each in its order.
pub(super) struct Connection {
    reader: FramedRead<ReadHalf<AnyStream>, ValueCodec>,
    outgoing: Rc<Outgoing>,
    writer: tokio::task::JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.writer.abort();
    }
}

/// Dials with the system's roots or the operator's: made once.
#[derive(Clone)]
pub(super) struct Dialer {
    options: Rc<RedisOptions>,
    tls: Option<TlsConnector>,
}

impl Dialer {
    pub(super) fn new(options: Rc<RedisOptions>) -> Result<Dialer, WireError> {
        let tls = options.tls.as_ref().map(connector).transpose()?;
        Ok(Dialer { options, tls })
    }

    /// A connection to a server of the data.
    pub(super) async fn server(&self, address: &Address) -> Result<Connection, WireError> {
        let mut connection = self.dial(address, &self.options.credentials).await?;
        if self.options.db != 0 {
            connection.ask(redis::cmd("SELECT").arg(self.options.db)).await?;
        }
        Ok(connection)
    }

    /// A connection to a Sentinel.
    pub(super) async fn sentinel(&self, address: &Address) -> Result<Connection, WireError> {
        self.dial(address, &self.options.sentinel_credentials).await
    }

    async fn dial(&self, address: &Address, credentials: &Credentials) -> Result<Connection, WireError> {
        let (host, port) = self.options.dialed(address);
        let dial = async {
            let stream = TcpStream::connect((&*host, port)).await?;
            stream.set_nodelay(true)?;
            let stream: AnyStream = match &self.tls {
                None => Box::new(stream),
                Some(tls) => {
                    // The certificate is of the server that was named, wherever it is dialed.
                    let name = ServerName::try_from(address.0.clone());
                    let name = name.map_err(|error| WireError::Tls(error.to_string()))?;
                    Box::new(tls.connect(name, stream).await?)
                }
            };
            Ok::<_, WireError>(stream)
        };
        let stream = tokio::time::timeout(DIAL_MAX, dial).await.map_err(|_| WireError::Slow)??;
        let mut connection = Connection::new(stream);
        connection.greet(credentials).await?;
        Ok(connection)
    }
}

impl Connection {
    fn new(stream: AnyStream) -> Connection {
        let (read, write) = tokio::io::split(stream);
        let outgoing = Rc::new(Outgoing::default());
        let writer = tokio::task::spawn_local(write_all(write, outgoing.clone()));
        let reader = FramedRead::with_capacity(read, ValueCodec::default(), READ_BUFFER_BYTES);
        Connection { reader, outgoing, writer }
    }

    async fn greet(&mut self, credentials: &Credentials) -> Result<(), WireError> {
        let mut hello = redis::cmd("HELLO");
        hello.arg(3);
        if let Some(password) = &credentials.password {
            hello.arg("AUTH").arg(credentials.username.as_deref().unwrap_or("default")).arg(&password.0);
        }
        self.ask(&hello).await.map(|_| ())
    }

    /// Sends; the answer will come from [`Connection::next`]. `false`: too much waits to be written, or writing
    /// failed.
    pub(super) fn send(&self, command: &Cmd) -> bool {
        let mut bytes = self.outgoing.bytes.borrow_mut();
        if bytes.len() > OUTGOING_BYTES_MAX || self.outgoing.failed.get() {
            return false;
        }
        command.write_packed_command(&mut bytes);
        self.outgoing.wake.notify_one();
        true
    }

    /// The next answer or push. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Value, WireError> {
        match self.reader.next().await {
            None => Err(WireError::Closed),
            Some(Ok(value)) => Ok(value),
            Some(Err(error)) => Err(WireError::Protocol(error.to_string())),
        }
    }

    /// The next answer or push if it is here already.
    pub(super) fn next_now(&mut self) -> Option<Result<Value, WireError>> {
        use futures_util::FutureExt;
        self.next().now_or_never()
    }

    /// Sends and takes the answer, within [`DIAL_MAX`]; pushes meanwhile are dropped. For greeting and topology: on
    /// a connection with nothing in flight.
    pub(super) async fn ask(&mut self, command: &Cmd) -> Result<Value, WireError> {
        self.send(command);
        let answer = async {
            loop {
                match self.next().await? {
                    Value::Push { .. } => (),
                    Value::ServerError(error) => {
                        let details = error.details().unwrap_or_default();
                        return Err(WireError::Refused(format!("{} {details}", error.code())));
                    }
                    value => return Ok(value),
                }
            }
        };
        tokio::time::timeout(DIAL_MAX, answer).await.map_err(|_| WireError::Slow)?
    }
}

async fn write_all(mut write: WriteHalf<AnyStream>, outgoing: Rc<Outgoing>) {
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        bytes.shrink_to(OUTGOING_BYTES_KEPT);
        std::mem::swap(&mut *outgoing.bytes.borrow_mut(), &mut bytes);
        if bytes.is_empty() {
            outgoing.wake.notified().await;
            continue;
        }
        let written = async {
            write.write_all(&bytes).await?;
            write.flush().await
        };
        if written.await.is_err() {
            // The reader hears of it too; until then nothing more is taken.
            return outgoing.failed.set(true);
        }
    }
}

fn connector(tls: &Tls) -> Result<TlsConnector, WireError> {
    let failed = |error: &dyn std::fmt::Display| WireError::Tls(error.to_string());
    let mut roots = RootCertStore::empty();
    match &tls.ca {
        Some(file) => {
            for certificate in CertificateDer::pem_file_iter(file).map_err(|error| failed(&error))? {
                let certificate = certificate.map_err(|error| failed(&error))?;
                roots.add(certificate).map_err(|error| failed(&error))?;
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    let provider = Arc::new(crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| failed(&error))?
        .with_root_certificates(roots);
    let config = match &tls.identity {
        None => config.with_no_client_auth(),
        Some((cert, key)) => {
            let chain = CertificateDer::pem_file_iter(cert).map_err(|error| failed(&error))?;
            let chain = chain.collect::<Result<Vec<_>, _>>().map_err(|error| failed(&error))?;
            let key = PrivateKeyDer::from_pem_file(key).map_err(|error| failed(&error))?;
            config.with_client_auth_cert(chain, key).map_err(|error| failed(&error))?
        }
    };
    Ok(TlsConnector::from(Arc::new(config)))
}
