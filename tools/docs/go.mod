module github.com/smtprelay/smtprelay/tools/docs

go 1.26.0

replace (
	github.com/smtprelay/smtprelay => ../..
	github.com/smtprelay/smtprelay/adapters/relayemail => ../../adapters/relayemail
	github.com/smtprelay/smtprelay/adapters/relayenmime => ../../adapters/relayenmime
	github.com/smtprelay/smtprelay/adapters/relaygomail => ../../adapters/relaygomail
	github.com/smtprelay/smtprelay/adapters/relaymail => ../../adapters/relaymail
	github.com/smtprelay/smtprelay/adapters/relaymailyak => ../../adapters/relaymailyak
	github.com/smtprelay/smtprelay/fileslots => ../../fileslots
	github.com/smtprelay/smtprelay/internal/natslog => ../../internal/natslog
	github.com/smtprelay/smtprelay/natsslots => ../../natsslots
	github.com/smtprelay/smtprelay/otelsmtprelay => ../../otelsmtprelay
	github.com/smtprelay/smtprelay/outbox => ../../outbox
	github.com/smtprelay/smtprelay/outbox/sqlitestore => ../../outbox/sqlitestore
	github.com/smtprelay/smtprelay/promsmtprelay => ../../promsmtprelay
)

require (
	github.com/domodwyer/mailyak/v3 v3.6.2
	github.com/emersion/go-msgauth v0.7.0
	github.com/hibiken/asynq v0.26.0
	github.com/jhillyerd/enmime/v2 v2.3.0
	github.com/jordan-wright/email v4.0.1-0.20210109023952-943e75fe5223+incompatible
	github.com/prometheus/client_golang v1.25.0
	github.com/riverqueue/river v0.51.2
	github.com/smtprelay/smtprelay v0.0.0
	github.com/smtprelay/smtprelay/adapters/relayemail v0.0.0
	github.com/smtprelay/smtprelay/adapters/relayenmime v0.0.0
	github.com/smtprelay/smtprelay/adapters/relaygomail v0.0.0
	github.com/smtprelay/smtprelay/adapters/relaymail v0.0.0
	github.com/smtprelay/smtprelay/adapters/relaymailyak v0.0.0
	github.com/wneessen/go-mail v0.8.1
	golang.org/x/tools v0.52.0
	gopkg.in/gomail.v2 v2.0.0-20160411212932-81ebce5c23df
	gopkg.in/mail.v2 v2.3.1
)

require (
	github.com/beorn7/perks v1.0.1 // indirect
	github.com/dustin/go-humanize v1.1.0 // indirect
	github.com/go-logr/logr v1.4.4 // indirect
	github.com/go-logr/stdr v1.2.2 // indirect
	github.com/klauspost/compress v1.20.4 // indirect
	github.com/munnerz/goautoneg v0.0.0-20191010083416-a7dc8b61c822 // indirect
	github.com/nats-io/nkeys v0.4.17 // indirect
	github.com/nats-io/nuid v1.0.1 // indirect
	github.com/ncruces/go-strftime v1.1.0 // indirect
	github.com/prometheus/client_model v0.6.3 // indirect
	github.com/prometheus/common v0.72.0 // indirect
	github.com/prometheus/procfs v0.22.0 // indirect
	github.com/remyoudompheng/bigfft v0.0.0-20230129092748-24d4a6f8daec // indirect
	github.com/smtprelay/smtprelay/internal/natslog v0.0.0 // indirect
	go.opentelemetry.io/auto/sdk v1.2.1 // indirect
	go.opentelemetry.io/otel v1.47.0 // indirect
	go.opentelemetry.io/otel/log v1.47.0 // indirect
	go.opentelemetry.io/otel/metric v1.47.0 // indirect
	go.opentelemetry.io/otel/trace v1.47.0 // indirect
	modernc.org/libc v1.80.1 // indirect
	modernc.org/mathutil v1.7.1 // indirect
	modernc.org/memory v1.12.1 // indirect
	modernc.org/sqlite v1.62.0 // indirect
)

require (
	github.com/cention-sany/utf7 v0.0.0-20170124080048-26cad61bd60a // indirect
	github.com/cespare/xxhash/v2 v2.3.0 // indirect
	github.com/clipperhouse/displaywidth v0.10.0 // indirect
	github.com/clipperhouse/uax29/v2 v2.6.0 // indirect
	github.com/dgryski/go-rendezvous v0.0.0-20200823014737-9f7001d12a5f // indirect
	github.com/emersion/go-sasl v0.0.0-20241020182733-b788ff22d5a6
	github.com/emersion/go-smtp v0.25.1 // indirect
	github.com/fatih/color v1.18.0 // indirect
	github.com/gogs/chardet v0.0.0-20211120154057-b7413eaefb8f // indirect
	github.com/google/uuid v1.6.0 // indirect
	github.com/inbucket/html2text v1.0.0 // indirect
	github.com/knadh/smtppool/v2 v2.1.2
	github.com/mattn/go-colorable v0.1.14 // indirect
	github.com/mattn/go-isatty v0.0.24 // indirect
	github.com/mattn/go-runewidth v0.0.19 // indirect
	github.com/nats-io/nats.go v1.55.0
	github.com/olekukonko/cat v0.0.0-20250911104152-50322a0618f6 // indirect
	github.com/olekukonko/errors v1.2.0 // indirect
	github.com/olekukonko/ll v0.1.6 // indirect
	github.com/olekukonko/tablewriter v1.1.3 // indirect
	github.com/pkg/errors v0.9.1 // indirect
	github.com/redis/go-redis/v9 v9.14.1 // indirect
	github.com/riverqueue/river/riverdriver v0.51.2 // indirect
	github.com/riverqueue/river/rivershared v0.51.2 // indirect
	github.com/riverqueue/river/rivertype v0.51.2 // indirect
	github.com/robfig/cron/v3 v3.0.1 // indirect
	github.com/smtprelay/smtprelay/fileslots v0.0.0
	github.com/smtprelay/smtprelay/natsslots v0.0.0
	github.com/smtprelay/smtprelay/otelsmtprelay v0.0.0
	github.com/smtprelay/smtprelay/outbox v0.0.0
	github.com/smtprelay/smtprelay/outbox/sqlitestore v0.0.0
	github.com/smtprelay/smtprelay/promsmtprelay v0.0.0
	github.com/spf13/cast v1.10.0 // indirect
	github.com/ssor/bom v0.0.0-20170718123548-6386211fdfcf // indirect
	github.com/tidwall/gjson v1.20.0 // indirect
	github.com/tidwall/match v1.2.0 // indirect
	github.com/tidwall/pretty v1.2.1 // indirect
	github.com/tidwall/sjson v1.2.5 // indirect
	golang.org/x/crypto v0.58.0 // indirect
	golang.org/x/mod v0.42.0 // indirect
	golang.org/x/net v0.61.0 // indirect
	golang.org/x/sync v0.25.0 // indirect
	golang.org/x/sys v0.50.0 // indirect
	golang.org/x/text v0.43.0 // indirect
	golang.org/x/time v0.16.0 // indirect
	google.golang.org/protobuf v1.36.12 // indirect
	gopkg.in/alexcesaro/quotedprintable.v3 v3.0.0-20150716171945-2caba252f4dc // indirect
)
