// Imports of the libraries that only pages use, so that go.mod keeps them.
package docs

import (
	_ "github.com/domodwyer/mailyak/v3"
	_ "github.com/emersion/go-sasl"
	_ "github.com/hibiken/asynq"
	_ "github.com/jhillyerd/enmime/v2"
	_ "github.com/jordan-wright/email"
	_ "github.com/knadh/smtppool/v2"
	_ "github.com/nats-io/nats.go/jetstream"
	_ "github.com/prometheus/client_golang/prometheus"
	_ "github.com/riverqueue/river"
	_ "github.com/wneessen/go-mail"
	_ "gopkg.in/gomail.v2"
	_ "gopkg.in/mail.v2"

	_ "github.com/smtprelay/smtprelay/adapters/relayemail"
	_ "github.com/smtprelay/smtprelay/adapters/relayenmime"
	_ "github.com/smtprelay/smtprelay/adapters/relaygomail"
	_ "github.com/smtprelay/smtprelay/adapters/relaymail"
	_ "github.com/smtprelay/smtprelay/adapters/relaymailyak"
	_ "github.com/smtprelay/smtprelay/fileslots"
	_ "github.com/smtprelay/smtprelay/natsslots"
	_ "github.com/smtprelay/smtprelay/otelsmtprelay"
	_ "github.com/smtprelay/smtprelay/outbox"
	_ "github.com/smtprelay/smtprelay/outbox/sqlitestore"
	_ "github.com/smtprelay/smtprelay/promsmtprelay"
)
