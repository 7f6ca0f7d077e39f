//! What `--demo` sets: everything open in `room:`, for trying things on one's own machine.

use super::error::{ConfigError, Origin};
use super::settings::{self, Setting};

/// Set whatever the file says.
const OPEN: &[(&str, &str)] = &[
    ("client.allow_anonymous_connect_without_token", "true"),
    ("namespaces.room.history_size", "100"),
    ("namespaces.room.history_ttl_ms", "300000"),
    ("namespaces.room.allow_positioning", "true"),
    ("namespaces.room.allow_recovery", "true"),
    ("namespaces.room.force_recovery", "true"),
    ("namespaces.room.presence", "true"),
    ("namespaces.room.join_leave", "true"),
    ("namespaces.room.allow_subscribe_for_client", "true"),
    ("namespaces.room.allow_subscribe_for_anonymous", "true"),
    ("namespaces.room.allow_publish_for_subscriber", "true"),
    ("namespaces.room.allow_publish_for_client", "true"),
    ("namespaces.room.allow_publish_for_anonymous", "true"),
    ("namespaces.room.allow_history_for_subscriber", "true"),
    ("namespaces.room.allow_history_for_client", "true"),
    ("namespaces.room.allow_history_for_anonymous", "true"),
    ("namespaces.room.allow_presence_for_subscriber", "true"),
    ("namespaces.room.allow_presence_for_client", "true"),
    ("namespaces.room.allow_presence_for_anonymous", "true"),
];

/// Set where the file says nothing: no balancer watches a demo, so that it may end at once.
const UNLESS_SET: &[(&str, &str)] = &[("server.drain_delay_ms", "0"), ("server.drain_timeout_ms", "5000")];

/// The settings of the demo, over those of the file.
pub(super) fn settings(file: &[Setting]) -> Result<Vec<Setting>, ConfigError> {
    let unset = UNLESS_SET.iter().filter(|(path, _)| !file.iter().any(|setting| setting.path == *path));
    let read = |(path, text): &(&str, &str)| {
        let setting = settings::from_flag(path, text, "--demo")?;
        Ok(Setting { origin: Origin::Demo, ..setting })
    };
    OPEN.iter().chain(unset).map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::resolved;
    use super::*;

    #[test]
    fn the_demo_opens_the_room_and_nothing_else() {
        let resolved = resolved("[namespaces.room]\nhistory_size = 1", &[], &[], true).unwrap();
        assert!(resolved.demo);
        let core = &resolved.config.core;
        assert!(core.client.allow_anonymous_connect_without_token);
        let room = &core.namespaces["room"];
        assert_eq!((room.history_size, room.history_ttl_ms), (100, 300_000));
        assert!(room.presence && room.join_leave && room.force_recovery);
        assert!(room.allow_publish_for_anonymous && room.allow_publish_for_client);
        assert!(room.allow_subscribe_for_anonymous && room.allow_subscribe_for_client);
        for name in ["user", "broadcast"] {
            let namespace = &core.namespaces[name];
            assert!(!namespace.allow_subscribe_for_client && !namespace.allow_publish_for_client, "{name}");
        }
        assert!(!core.channel.allow_subscribe_for_client);
    }

    #[test]
    fn flags_and_variables_still_win_and_so_does_the_files_drain() {
        let variables = [("RINGMAIN_NAMESPACES_ROOM_HISTORY_SIZE", "7")];
        let flags = ["namespaces.room.presence=false"];
        let file = "[server]\ndrain_delay_ms = 1234";
        let resolved = resolved(file, &variables, &flags, true).unwrap();
        let room = &resolved.config.core.namespaces["room"];
        assert_eq!((room.history_size, room.presence), (7, false));
        assert_eq!(resolved.config.node.server.drain_delay_ms, 1234);
        assert_eq!(resolved.config.node.server.drain_timeout_ms, 5000);
        assert_eq!(resolved.origins["client.allow_anonymous_connect_without_token"], Origin::Demo);
    }
}
