//! The two Kafka clients of a node, producer and consumer, as one.
//!
//! Owns: their configuration, sending, fetching, delivery reports. Must not know: what the messages mean.
//! Invariants: the consumer is told which partitions to read, joins no group and commits nothing; the producer is
//! idempotent, waits for all in-sync replicas, and gives a message up after [`DELIVERY_MS_MAX`].

use std::sync::Arc;

use bytes::Bytes;
use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{Consumer, ConsumerContext, StreamConsumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::message::{DeliveryResult, Message as _};
use rdkafka::producer::{BaseRecord, ProducerContext, ThreadedProducer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use tokio::sync::mpsc::UnboundedSender;

use super::options::KafkaOptions;
use super::partition::{SendError, Start};

/// When the producer gives a message up, in milliseconds: below what the hub waits for an answer.
pub(super) const DELIVERY_MS_MAX: u64 = 2_000;

/// Messages that wait in the producer. Above it a publish is refused as overloaded.
const QUEUE_MESSAGES_MAX: u32 = 100_000;

/// The same in KiB.
const QUEUE_KIB_MAX: u32 = 64 << 10;

/// What waits in the consumer for us, in KiB.
const FETCHED_KIB_MAX: u32 = 16 << 10;

const _: () = assert!(DELIVERY_MS_MAX < crate::hub::COMMAND_MS_MAX);

/// A delivery report.
#[derive(Debug)]
pub(super) struct Delivered {
    /// Of which session: those of earlier ones are nobody's.
    pub(super) session: u64,
    pub(super) partition: u32,
    pub(super) sequence: u64,
    /// Kafka's offset; negative where the broker did not tell it.
    pub(super) result: Result<i64, SendError>,
    /// The client can be used no more.
    pub(super) is_fatal: bool,
}

/// Callbacks of the clients; they run on the clients' own threads.
#[derive(Debug)]
pub(super) struct Callbacks {
    session: u64,
    delivered: UnboundedSender<Delivered>,
}

impl ClientContext for Callbacks {
    fn log(&self, level: RDKafkaLogLevel, _: &str, message: &str) {
        match level {
            RDKafkaLogLevel::Debug | RDKafkaLogLevel::Info | RDKafkaLogLevel::Notice => (),
            _ => tracing::debug!(message, "Kafka client"),
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        // The client heals by itself; what matters is noticed by the canary.
        tracing::debug!(%error, reason, "Kafka client");
    }
}

impl ConsumerContext for Callbacks {}

impl ProducerContext for Callbacks {
    type DeliveryOpaque = usize;

    fn delivery(&self, report: &DeliveryResult<'_>, sequence: usize) {
        let (message, error) = match report {
            Ok(message) => (message, None),
            Err((error, message)) => (message, Some(error)),
        };
        let code = error.map(|error| error.rdkafka_error_code().unwrap_or(Code::Fail));
        let is_fatal = code.is_some_and(|code| {
            matches!(
                code,
                Code::Fatal
                    | Code::OutOfOrderSequenceNumber
                    | Code::InvalidProducerEpoch
                    | Code::UnknownProducerId
            )
        });
        // The receiver outlives every session, but for the end of the node.
        let _ = self.delivered.send(Delivered {
            session: self.session,
            partition: message.partition().cast_unsigned(),
            sequence: sequence as u64,
            result: code.map_or_else(|| Ok(message.offset()), |code| Err(send_error(code))),
            is_fatal,
        });
    }
}

/// What an error says about whether the message was written.
fn send_error(code: Code) -> SendError {
    match code {
        Code::QueueFull => SendError::Full,
        Code::TopicAuthorizationFailed
        | Code::ClusterAuthorizationFailed
        | Code::MessageSizeTooLarge
        | Code::UnknownTopic
        | Code::UnknownPartition => SendError::Refused,
        _ => SendError::Unknown,
    }
}

/// What was fetched.
#[derive(Debug)]
pub(super) enum Fetched {
    Message {
        partition: u32,
        offset: i64,
        time_ms: i64,
        payload: Bytes,
    },
    /// Some partition cannot be read from where it was told to begin.
    NoSuchOffset,
    /// The client can be used no more.
    Fatal,
    /// It tells of trouble with a broker; it tries again by itself.
    Trouble,
}

/// See the module's doc.
pub(super) struct Session {
    pub(super) number: u64,
    topic: String,
    producer: ThreadedProducer<Callbacks>,
    consumer: Arc<StreamConsumer<Callbacks>>,
}

impl Session {
    /// Makes the clients; they connect by themselves. Fails where the configuration is refused.
    pub(super) fn new(
        options: &KafkaOptions,
        number: u64,
        delivered: &UnboundedSender<Delivered>,
    ) -> Result<Session, KafkaError> {
        let callbacks = || Callbacks { session: number, delivered: delivered.clone() };
        let producer = producer_config(options).create_with_context(callbacks())?;
        let consumer = consumer_config(options).create_with_context(callbacks())?;
        Ok(Session { number, topic: options.topic.clone(), producer, consumer: Arc::new(consumer) })
    }

    /// Hands a message over to be sent.
    pub(super) fn send(&self, partition: u32, sequence: u64, payload: &Bytes) -> Result<(), SendError> {
        let record = BaseRecord::<(), [u8], usize>::with_opaque_to(&self.topic, sequence as usize)
            .partition(partition.cast_signed())
            .payload(payload.as_ref());
        self.producer.send(record).map_err(|(error, _)| match error.rdkafka_error_code() {
            Some(Code::QueueFull) => SendError::Full,
            // Not handed over.
            _ => SendError::Refused,
        })
    }

    /// Fetches a partition from here on.
    pub(super) fn assign(&self, partition: u32, start: Start) -> Result<(), KafkaError> {
        let offset = match start {
            Start::At(offset) => Offset::Offset(offset),
            Start::Tail(messages) => Offset::OffsetTail(messages),
            Start::Beginning => Offset::Beginning,
        };
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&self.topic, partition.cast_signed(), offset)?;
        self.consumer.incremental_assign(&list)
    }

    /// Fetches a partition no more.
    pub(super) fn unassign(&self, partition: u32) -> Result<(), KafkaError> {
        let mut list = TopicPartitionList::new();
        list.add_partition(&self.topic, partition.cast_signed());
        self.consumer.incremental_unassign(&list)
    }

    /// What is fetched next. Cancellation-safe.
    pub(super) async fn fetched(&self) -> Fetched {
        match self.consumer.recv().await {
            Ok(message) => Fetched::Message {
                partition: message.partition().cast_unsigned(),
                offset: message.offset(),
                time_ms: message.timestamp().to_millis().unwrap_or(0),
                payload: Bytes::copy_from_slice(message.payload().unwrap_or_default()),
            },
            Err(KafkaError::MessageConsumptionFatal(_)) => Fetched::Fatal,
            Err(error) => match error.rdkafka_error_code() {
                Some(Code::AutoOffsetReset | Code::OffsetOutOfRange | Code::LogTruncation) => {
                    Fetched::NoSuchOffset
                }
                _ => Fetched::Trouble,
            },
        }
    }

    /// Ends the clients. Takes a moment, so it is done on a thread of its own.
    pub(super) fn end(self) {
        std::thread::spawn(move || drop(self));
    }
}

/// What both clients have in common: where the brokers are, who we are, and patience of about a second.
pub(super) fn common_config(options: &KafkaOptions) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", options.brokers.join(","))
        .set("client.id", "ringmain")
        .set("socket.keepalive.enable", "true")
        .set("socket.nagle.disable", "true")
        .set("socket.timeout.ms", "2000")
        .set("socket.connection.setup.timeout.ms", "1500")
        .set("reconnect.backoff.ms", "50")
        .set("reconnect.backoff.max.ms", "500")
        .set("retry.backoff.ms", "50")
        .set("retry.backoff.max.ms", "250")
        .set("topic.metadata.refresh.interval.ms", "2000")
        .set("topic.metadata.refresh.fast.interval.ms", "100")
        .set("allow.auto.create.topics", "false");
    let security = match (&options.tls, &options.credentials) {
        (None, None) => "plaintext",
        (Some(_), None) => "ssl",
        (None, Some(_)) => "sasl_plaintext",
        (Some(_), Some(_)) => "sasl_ssl",
    };
    config.set("security.protocol", security);
    if let Some(credentials) = &options.credentials {
        config
            .set("sasl.mechanism", &credentials.mechanism)
            .set("sasl.username", &credentials.user)
            .set("sasl.password", &credentials.password);
    }
    for (key, file) in options.tls.iter().flat_map(|tls| {
        [
            ("ssl.ca.location", &tls.ca_file),
            ("ssl.certificate.location", &tls.certificate_file),
            ("ssl.key.location", &tls.key_file),
        ]
    }) {
        if let Some(file) = file {
            config.set(key, file);
        }
    }
    config
}

fn producer_config(options: &KafkaOptions) -> ClientConfig {
    let mut config = common_config(options);
    config
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("max.in.flight.requests.per.connection", options.in_flight_max.clamp(1, 5).to_string())
        .set("linger.ms", options.linger_ms.to_string())
        .set("request.timeout.ms", "1500")
        .set("message.timeout.ms", DELIVERY_MS_MAX.to_string())
        .set("message.max.bytes", message_bytes_max(options).to_string())
        .set("queue.buffering.max.messages", QUEUE_MESSAGES_MAX.to_string())
        .set("queue.buffering.max.kbytes", QUEUE_KIB_MAX.to_string());
    config
}

fn consumer_config(options: &KafkaOptions) -> ClientConfig {
    let mut config = common_config(options);
    config
        // The client wants a name; nobody joins this group.
        .set("group.id", "ringmain")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "error")
        .set("isolation.level", "read_uncommitted")
        .set("check.crcs", "true")
        .set("fetch.wait.max.ms", options.fetch_wait_ms.to_string())
        .set("fetch.error.backoff.ms", "50")
        .set("fetch.queue.backoff.ms", "5")
        .set("fetch.message.max.bytes", message_bytes_max(options).to_string())
        .set("receive.message.max.bytes", "100000000")
        .set("queued.max.messages.kbytes", FETCHED_KIB_MAX.to_string());
    config
}

/// Largest message on the broker: a record with its envelope.
pub(super) fn message_bytes_max(options: &KafkaOptions) -> usize {
    options.record_bytes_max + (64 << 10)
}
