// Here belongs what Prometheus is told of an outbox.
package promoutbox

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/smtprelay/smtprelay/outbox"
)

// source is an outbox that stands so.
type source struct {
	stats outbox.Stats
	err   error
}

func (s *source) Stats(context.Context) (outbox.Stats, error) { return s.stats, s.err }

const ofProcess = `
# HELP smtprelay_outbox_in_hand Messages that this process is sending.
# TYPE smtprelay_outbox_in_hand gauge
smtprelay_outbox_in_hand 5
# HELP smtprelay_outbox_ended_total Deliveries of this process that have ended; deferred ones are tried again.
# TYPE smtprelay_outbox_ended_total counter
smtprelay_outbox_ended_total{state="accepted"} 6
smtprelay_outbox_ended_total{state="deferred"} 9
smtprelay_outbox_ended_total{state="dead"} 7
smtprelay_outbox_ended_total{state="unknown"} 8
`

const ofStore = `
# HELP smtprelay_outbox_messages Messages in the store that are not over.
# TYPE smtprelay_outbox_messages gauge
smtprelay_outbox_messages{state="queued"} 1
smtprelay_outbox_messages{state="sending"} 2
smtprelay_outbox_messages{state="dead"} 3
smtprelay_outbox_messages{state="unknown"} 4
# HELP smtprelay_outbox_oldest_seconds How long the message is due that was enqueued first, of those that are due.
# TYPE smtprelay_outbox_oldest_seconds gauge
smtprelay_outbox_oldest_seconds 60
`

const up = `
# HELP smtprelay_outbox_up 1 if the store has answered.
# TYPE smtprelay_outbox_up gauge
smtprelay_outbox_up `

func TestCollectorTellsOfTheStoreAndOfTheProcess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &source{stats: outbox.Stats{Stored: outbox.Counts{Queued: 1, Sending: 2, Dead: 3, Unknown: 4, Oldest: time.Now().Add(-time.Minute)}, InHand: 5,
			Ended: outbox.Ended{Accepted: 6, Dead: 7, Unknown: 8, Deferred: 9}}}
		c := New(s)
		if err := prometheus.NewPedanticRegistry().Register(c); err != nil {
			t.Error(err)
		}
		if err := testutil.CollectAndCompare(c, strings.NewReader(ofProcess+ofStore+up+"1\n")); err != nil {
			t.Error(err)
		}
		s.err = errors.New("no answer")
		if err := testutil.CollectAndCompare(c, strings.NewReader(ofProcess+up+"0\n")); err != nil {
			t.Error(err)
		}
	})
}
