module github.com/smtprelay/smtprelay/examples/cluster

go 1.26.0

require (
	github.com/nats-io/nats.go v1.55.0
	github.com/smtprelay/smtprelay v0.0.0
	github.com/smtprelay/smtprelay/natsslots v0.0.0
	github.com/smtprelay/smtprelay/outbox v0.0.0
	github.com/smtprelay/smtprelay/outbox/natsstore v0.0.0
)

require (
	github.com/antithesishq/antithesis-sdk-go v0.9.0-default-no-op // indirect
	github.com/emersion/go-sasl v0.0.0-20241020182733-b788ff22d5a6 // indirect
	github.com/emersion/go-smtp v0.25.1 // indirect
	github.com/google/go-tpm v0.9.8 // indirect
	github.com/klauspost/compress v1.20.4 // indirect
	github.com/minio/highwayhash v1.0.4 // indirect
	github.com/nats-io/jwt/v2 v2.8.3 // indirect
	github.com/nats-io/nats-server/v2 v2.15.3 // indirect
	github.com/nats-io/nkeys v0.4.17 // indirect
	github.com/nats-io/nuid v1.0.1 // indirect
	github.com/smtprelay/smtprelay/internal/natslog v0.0.0 // indirect
	golang.org/x/crypto v0.58.0 // indirect
	golang.org/x/sync v0.25.0 // indirect
	golang.org/x/sys v0.50.0 // indirect
	golang.org/x/time v0.16.0 // indirect
)

replace (
	github.com/smtprelay/smtprelay => ../..
	github.com/smtprelay/smtprelay/internal/natslog => ../../internal/natslog
	github.com/smtprelay/smtprelay/natsslots => ../../natsslots
	github.com/smtprelay/smtprelay/outbox => ../../outbox
	github.com/smtprelay/smtprelay/outbox/natsstore => ../../outbox/natsstore
)
