package promsmtprelay

import (
	"context"
	"errors"
	"strconv"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/smtprelay/smtprelay"
)

// Metrics is a [prometheus.Collector] of the metrics of Clients. Make one with [New]; it is safe for concurrent use.
type Metrics struct {
	trace                                    smtprelay.Trace
	sending, waiting, dialling               *prometheus.HistogramVec
	errors, lessons                          *prometheus.CounterVec
	messages, refused, conns, limit, waiters *prometheus.Desc
	waits, waited, retries, overlapped       *prometheus.Desc
	dials, auths, closed                     *prometheus.Desc

	mu      sync.Mutex // guards clients
	clients []*smtprelay.Client
}

// The boundaries of the histograms, in seconds. A message on a busy connection takes one round trip; a relay that scans takes
// seconds, and the default time limits are minutes.
var (
	sendSeconds = []float64{0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300}
	waitSeconds = []float64{0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 120}
)

// New returns Metrics without Clients. It registers nothing.
func New() *Metrics {
	histogram := func(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "smtprelay_" + name, Help: help, Buckets: buckets},
			append([]string{"client"}, labels...))
	}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "smtprelay_" + name, Help: help}, append([]string{"client"}, labels...))
	}
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("smtprelay_"+name, help, append([]string{"client"}, labels...), nil)
	}
	m := &Metrics{
		sending:    histogram("send_duration_seconds", "Duration of Send.", sendSeconds, "outcome"),
		waiting:    histogram("wait_duration_seconds", "How long a try of a message waited for a connection.", waitSeconds),
		dialling:   histogram("dial_duration_seconds", "How long it took until a connection was ready or had failed.", sendSeconds, "result"),
		errors:     counter("errors_total", "Failed Sends by step and code of the reply.", "step", "code"),
		lessons:    counter("lessons_total", "What was learnt about the relay.", "lesson"),
		messages:   desc("messages_total", "Messages whose Send has ended.", "outcome"),
		refused:    desc("recipients_refused_total", "Recipients refused."),
		conns:      desc("connections", "Connections open or being opened.", "state"),
		limit:      desc("connections_limit", "Connections that may be open, as configured or as learnt from the relay."),
		waiters:    desc("waiting_sends", "Sends that wait for a connection."),
		waits:      desc("waits_total", "Connections waited for."),
		waited:     desc("wait_seconds_total", "How long connections were waited for, all of them together."),
		retries:    desc("retries_total", "Further tries of messages."),
		overlapped: desc("overlapped_total", "Transactions begun before the one ahead had its final reply."),
		dials:      desc("dials_total", "Connections tried.", "result"),
		auths:      desc("auths_total", "AUTH commands sent.", "result"),
		closed:     desc("connections_closed_total", "Connections closed.", "reason"),
	}
	m.trace = smtprelay.Trace{
		SendDone: func(_ context.Context, i smtprelay.SendDoneInfo) {
			m.sending.WithLabelValues(i.Name, outcomes[smtprelay.OutcomeOf(i.Err)]).Observe(i.Took.Seconds())
			if e, ok := errors.AsType[*smtprelay.Error](i.Err); ok {
				code := ""
				if e.Reply.Code != 0 {
					code = strconv.Itoa(e.Reply.Code)
				}
				m.errors.WithLabelValues(i.Name, string(e.Op), code).Inc()
			}
		},
		GotConn: func(_ context.Context, i smtprelay.GotConnInfo) {
			m.waiting.WithLabelValues(i.Name).Observe(i.Waited.Seconds())
		},
		DialDone: func(_ context.Context, i smtprelay.DialDoneInfo) {
			result := "ok"
			if i.Err != nil {
				result = "failed"
			}
			m.dialling.WithLabelValues(i.Name, result).Observe(i.Took.Seconds())
		},
		Learned: func(_ context.Context, i smtprelay.LearnedInfo) {
			m.lessons.WithLabelValues(i.Name, string(i.Lesson)).Inc()
		},
	}
	return m
}

var outcomes = [...]string{smtprelay.Unknown: "unknown", smtprelay.Accepted: "accepted", smtprelay.NotAccepted: "not_accepted"}

// Trace returns the Trace for [smtprelay.Config.Trace]. One may serve several Clients.
func (m *Metrics) Trace() *smtprelay.Trace {
	t := m.trace
	return &t
}

// Watch adds Clients whose Stats are collected. A Client that was shut down is still counted, so that no total ever falls.
func (m *Metrics) Watch(clients ...*smtprelay.Client) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.clients = append(m.clients, clients...)
}

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.messages, m.refused, m.conns, m.limit, m.waiters, m.waits, m.waited, m.retries, m.overlapped, m.dials, m.auths, m.closed} {
		ch <- d
	}
	for _, c := range m.traced() {
		c.Describe(ch)
	}
}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	for name, s := range m.stats() {
		counter := func(d *prometheus.Desc, v float64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, append([]string{name}, labels...)...)
		}
		gauge := func(d *prometheus.Desc, v int, labels ...string) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), append([]string{name}, labels...)...)
		}
		gauge(m.conns, s.IdleConns, "idle")
		gauge(m.conns, s.OpenConns-s.IdleConns, "used")
		gauge(m.limit, s.MaxConns)
		gauge(m.waiters, s.Waiting)
		counter(m.messages, float64(s.Accepted), "accepted")
		counter(m.messages, float64(s.NotAccepted), "not_accepted")
		counter(m.messages, float64(s.Unknown), "unknown")
		counter(m.refused, float64(s.Refused))
		counter(m.waits, float64(s.WaitCount))
		counter(m.waited, s.WaitDuration.Seconds())
		counter(m.retries, float64(s.Retries))
		counter(m.overlapped, float64(s.Overlapped))
		counter(m.dials, float64(s.Dials-s.DialErrors), "ok")
		counter(m.dials, float64(s.DialErrors), "failed")
		counter(m.auths, float64(s.Auths-s.AuthErrors), "ok")
		counter(m.auths, float64(s.AuthErrors), "failed")
		counter(m.closed, float64(s.ClosedFull), "full")
		counter(m.closed, float64(s.ClosedAge), "age")
		counter(m.closed, float64(s.ClosedIdle), "idle")
		counter(m.closed, float64(s.ClosedFaulty), "fault")
	}
	for _, c := range m.traced() {
		c.Collect(ch)
	}
}

func (m *Metrics) traced() []prometheus.Collector {
	return []prometheus.Collector{m.sending, m.waiting, m.dialling, m.errors, m.lessons}
}

// stats are the Stats of the Clients by name; those of one name are added up.
func (m *Metrics) stats() map[string]smtprelay.Stats {
	m.mu.Lock()
	clients := m.clients[:len(m.clients):len(m.clients)]
	m.mu.Unlock()
	byName := make(map[string]smtprelay.Stats)
	for _, c := range clients {
		s := c.Stats()
		all := byName[s.Name]
		all.MaxConns += s.MaxConns
		all.OpenConns += s.OpenConns
		all.IdleConns += s.IdleConns
		all.Waiting += s.Waiting
		all.Accepted += s.Accepted
		all.NotAccepted += s.NotAccepted
		all.Unknown += s.Unknown
		all.Refused += s.Refused
		all.WaitCount += s.WaitCount
		all.WaitDuration += s.WaitDuration
		all.Retries += s.Retries
		all.Overlapped += s.Overlapped
		all.Dials += s.Dials
		all.DialErrors += s.DialErrors
		all.Auths += s.Auths
		all.AuthErrors += s.AuthErrors
		all.ClosedFull += s.ClosedFull
		all.ClosedAge += s.ClosedAge
		all.ClosedIdle += s.ClosedIdle
		all.ClosedFaulty += s.ClosedFaulty
		byName[s.Name] = all
	}
	return byName
}
