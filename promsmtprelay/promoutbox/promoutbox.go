// Package promoutbox gives Prometheus the metrics of an outbox:
//
//	prometheus.MustRegister(promoutbox.New(box))
//
// smtprelay_outbox_messages{state} and smtprelay_outbox_oldest_seconds describe the store: each process that shares it reports the
// same, so take the max and not the sum. smtprelay_outbox_in_hand and smtprelay_outbox_ended_total{state} describe the process.
//
// Alerts to begin with:
//
//	max(smtprelay_outbox_oldest_seconds) > 600             the relay does not keep up, or is away
//	max(smtprelay_outbox_messages{state="unknown"}) > 0    somebody has to look: Outbox.List, Outbox.Resolve
//	increase(smtprelay_outbox_ended_total{state="dead"}[1h]) > 100
//	smtprelay_outbox_up == 0                               the store does not answer
package promoutbox

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/smtprelay/smtprelay/outbox"
)

// Source is an [outbox.Outbox].
type Source interface {
	Stats(ctx context.Context) (outbox.Stats, error)
}

// timeout is how long the store may take for an answer.
const timeout = 5 * time.Second

// Collector is a [prometheus.Collector] of an outbox. It is safe for concurrent use.
type Collector struct {
	source                              Source
	messages, oldest, inHand, ended, up *prometheus.Desc
}

// New returns a Collector. Several in one registry need different labels: see prometheus.WrapRegistererWith.
func New(source Source) *Collector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("smtprelay_outbox_"+name, help, labels, nil)
	}
	return &Collector{
		source:   source,
		messages: desc("messages", "Messages in the store that are not over.", "state"),
		oldest:   desc("oldest_seconds", "How long the message is due that was enqueued first, of those that are due."),
		inHand:   desc("in_hand", "Messages that this process is sending."),
		ended:    desc("ended_total", "Deliveries of this process that have ended; deferred ones are tried again.", "state"),
		up:       desc("up", "1 if the store has answered."),
	}
}

// Describe implements [prometheus.Collector].
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.messages, c.oldest, c.inHand, c.ended, c.up} {
		ch <- d
	}
}

// Collect implements [prometheus.Collector]. If the store does not answer, the metrics of the store are left out.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	s, err := c.source.Stats(ctx)
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(c.inHand, float64(s.InHand))
	for state, n := range map[string]uint64{"accepted": s.Ended.Accepted, "deferred": s.Ended.Deferred, "dead": s.Ended.Dead, "unknown": s.Ended.Unknown} {
		ch <- prometheus.MustNewConstMetric(c.ended, prometheus.CounterValue, float64(n), state)
	}
	if err != nil {
		gauge(c.up, 0)
		return
	}
	gauge(c.up, 1)
	for state, n := range map[outbox.State]int{outbox.Queued: s.Stored.Queued, outbox.Sending: s.Stored.Sending, outbox.Dead: s.Stored.Dead, outbox.Unknown: s.Stored.Unknown} {
		gauge(c.messages, float64(n), state.String())
	}
	age := 0.0
	if !s.Stored.Oldest.IsZero() {
		age = max(time.Since(s.Stored.Oldest).Seconds(), 0)
	}
	gauge(c.oldest, age)
}
