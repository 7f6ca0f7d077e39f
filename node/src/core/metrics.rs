//! What the core counts.
//!
//! Owns the list of counters and gauges of one shard and their plain values. It knows nothing of
//! how they leave the shard: `io` copies them to shared memory between turns, `control` renders
//! them. No user, channel or id is ever a label.

/// Declares the metrics of a shard: variant, metric family, label `reason`/`kind` or empty, help.
macro_rules! metrics {
    ($($variant:ident = ($family:literal, $kind:ident, $label:literal, $help:literal),)*) => {
        /// One metric of a shard.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub enum Metric { $(
            #[doc = $help]
            $variant,
        )* }

        /// Every metric, in the order of [`Values`].
        pub const METRICS: &[MetricInfo] = &[ $(
            MetricInfo { metric: Metric::$variant, family: $family, kind: Kind::$kind, label: $label, help: $help },
        )* ];
    };
}

/// Whether a value only grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Grows only; `_total` is appended to its family.
    Counter,
    /// Goes up and down.
    Gauge,
}

/// How a metric is rendered.
#[derive(Clone, Copy, Debug)]
pub struct MetricInfo {
    /// Which one.
    pub metric: Metric,
    /// Its Prometheus family, without prefix and without `_total`.
    pub family: &'static str,
    /// Counter or gauge.
    pub kind: Kind,
    /// The value of its `reason` label (`""`: no such label).
    pub label: &'static str,
    /// What it means. The same for all members of a family.
    pub help: &'static str,
}

metrics! {
    // The loop counts what happens at the sockets and the inboxes, the core everything else.
    Connections = ("connections", Gauge, "", "Connections held now"),
    Sessions = ("sessions", Gauge, "", "Connections that completed the connect command"),
    Subscriptions = ("subscriptions", Gauge, "", "Subscriptions held now"),
    Channels = ("channels", Gauge, "", "Channels known to this shard"),
    Accepted = ("accepted", Counter, "", "Connections accepted"),
    Refused = ("refused", Counter, "", "Connections refused because the node was full or draining"),
    HandedOver = ("handed_over", Counter, "", "Accepted connections handed to an emptier shard"),
    HandshakeFailed = ("handshake_failed", Counter, "", "Connections closed before the WebSocket handshake was done"),
    BytesIn = ("received_bytes", Counter, "", "Bytes received from clients"),
    BytesOut = ("sent_bytes", Counter, "", "Bytes accepted by the sockets of clients"),
    MessagesIn = ("messages_in", Counter, "", "Client messages received"),
    Commands = ("commands", Counter, "", "Client commands handled"),
    CommandErrors = ("command_errors", Counter, "", "Client commands answered with an error"),
    Publications = ("publications", Counter, "", "Publications accepted on their home shard"),
    Deliveries = ("deliveries", Counter, "", "Publications offered to subscribers' sockets"),
    Sends = ("sends", Counter, "", "Sends submitted to the kernel"),
    SendsShort = ("sends_short", Counter, "", "Sends that the kernel did not take whole"),
    Turns = ("turns", Counter, "", "Turns of the shard loop"),
    MeshMessages = ("mesh_messages", Counter, "", "Messages received from other shards"),
    MeshBatches = ("mesh_batches", Counter, "", "Batches received from other shards"),
    OwnBytes = ("own_queue_bytes", Gauge, "", "Bytes that wait in connections' own queues"),
    LogBytes = ("log_bytes", Gauge, "", "Bytes held in the logs of channels"),
    HistoryBytes = ("history_bytes", Gauge, "", "Bytes held in the history of channels"),
    InfoBytes = ("info_bytes", Gauge, "", "Bytes of presence and of what users show of themselves"),
    PartialBytes = ("partial_bytes", Gauge, "", "Bytes of partial frames and handshakes"),
    Lagging = ("lagging_subscriptions", Gauge, "", "Subscriptions with a cursor of their own"),
    MeshBytes = ("mesh_bytes", Gauge, "", "Bytes that wait for other shards or are on their way to them, relays included"),
    MeshPending = ("mesh_pending", Gauge, "", "Messages that wait for another shard's credit"),
    DropSkipped = ("dropped", Counter, "skipped", "What was given up, by reason: once for each reader, or for each message refused"),
    DropLost = ("dropped", Counter, "insufficient_state", "What was given up, by reason: once for each reader, or for each message refused"),
    DropJoinLeave = ("dropped", Counter, "join_leave", "What was given up, by reason: once for each reader, or for each message refused"),
    DropNews = ("dropped", Counter, "news", "What was given up, by reason: once for each reader, or for each message refused"),
    DropMember = ("dropped", Counter, "remote_member", "What was given up, by reason: once for each reader, or for each message refused"),
    DropPublishRefused = ("dropped", Counter, "publish_refused", "What was given up, by reason: once for each reader, or for each message refused"),
    PresencePartial = ("presence_partial", Counter, "", "Questions for presence that were answered without all nodes"),
    CloseNormal = ("closed", Counter, "client", "Connections closed, by reason"),
    CloseBroken = ("closed", Counter, "broken", "Connections closed, by reason"),
    CloseBadRequest = ("closed", Counter, "bad_request", "Connections closed, by reason"),
    CloseProtocol = ("closed", Counter, "protocol_error", "Connections closed, by reason"),
    CloseTooBig = ("closed", Counter, "message_too_big", "Connections closed, by reason"),
    CloseInvalidUtf8 = ("closed", Counter, "invalid_utf8", "Connections closed, by reason"),
    CloseInvalidToken = ("closed", Counter, "invalid_token", "Connections closed, by reason"),
    CloseExpired = ("closed", Counter, "expired", "Connections closed, by reason"),
    CloseStale = ("closed", Counter, "stale", "Connections closed, by reason"),
    CloseSlow = ("closed", Counter, "slow", "Connections closed, by reason"),
    CloseSlowFrame = ("closed", Counter, "slow_frame", "Connections closed, by reason"),
    CloseLost = ("closed", Counter, "insufficient_state", "Connections closed, by reason"),
    CloseNoPong = ("closed", Counter, "no_pong", "Connections closed, by reason"),
    CloseForced = ("closed", Counter, "forced", "Connections closed, by reason"),
    CloseShutdown = ("closed", Counter, "shutdown", "Connections closed, by reason"),
    CloseLimit = ("closed", Counter, "limit", "Connections closed, by reason"),
    CloseOther = ("closed", Counter, "other", "Connections closed, by reason"),
    CloseTimeout = ("closed", Counter, "close_timeout", "Connections closed, by reason"),
    HttpRequests = ("http_requests", Counter, "", "Plain HTTP requests answered on the traffic port"),
}

/// The number of metrics.
pub const METRIC_COUNT: usize = METRICS.len();

/// The values of one shard.
#[derive(Clone, Debug)]
pub struct Values([u64; METRIC_COUNT]);

impl Default for Values {
    fn default() -> Self {
        Self([0; METRIC_COUNT])
    }
}

impl Values {
    /// Adds `n` to a metric.
    #[inline]
    pub fn add(&mut self, metric: Metric, n: u64) {
        let value = &mut self.0[metric as usize];
        *value = value.wrapping_add(n);
    }

    /// Takes `n` from a gauge; never below zero.
    #[inline]
    pub fn sub(&mut self, metric: Metric, n: u64) {
        let value = &mut self.0[metric as usize];
        debug_assert!(*value >= n, "{metric:?} below zero");
        *value = value.saturating_sub(n);
    }

    /// Sets a gauge.
    #[inline]
    pub fn set(&mut self, metric: Metric, n: u64) {
        self.0[metric as usize] = n;
    }

    /// Reads a metric.
    #[inline]
    pub fn get(&self, metric: Metric) -> u64 {
        self.0[metric as usize]
    }

    /// All values in the order of [`METRICS`].
    pub fn as_slice(&self) -> &[u64] {
        &self.0
    }
}
