package smtprelay

import (
	"sync/atomic"
	"time"

	"github.com/smtprelay/smtprelay/internal/conn"
)

// Stats is a snapshot of a Client, as [Client.Stats] returns it. All its fields can be exported as metrics: see the example of Client.Stats.
type Stats struct {
	Name string // Config.Name

	// Gauges: the state now.
	MaxConns  int // the limit in force: Limits.MaxConns, or less if the relay replied that there are too many connections
	OpenConns int // connections that count for the limit: open, being opened, or not yet closed by the relay
	IdleConns int // connections without a message
	Waiting   int // Sends that wait for a connection

	// Counters since New.
	Accepted     int64         // messages accepted for at least one recipient
	NotAccepted  int64         // messages not accepted for any recipient
	Unknown      int64         // messages whose outcome is Unknown
	Refused      int64         // recipients refused
	WaitCount    int64         // waits for a connection
	WaitDuration time.Duration // total time of these waits
	Retries      int64         // retries of messages, including immediate retries on another connection
	Overlapped   int64         // transactions begun before the previous one had its final reply
	Dials        int64         // attempts to open a connection
	DialErrors   int64         // those of Dials that failed
	Auths        int64         // AUTH commands sent
	AuthErrors   int64         // those of Auths that were refused
	ClosedFull   int64         // connections closed at Limits.MaxMessagesPerConn
	ClosedAge    int64         // connections closed at Limits.MaxConnAge
	ClosedIdle   int64         // connections closed at Limits.MaxIdleTime
	ClosedFaulty int64         // connections closed by the relay or after a failure
}

// counters are the counters of Stats.
type counters struct {
	accepted, notAccepted, unknown, refused atomic.Int64
	waits, waited                           atomic.Int64
	retries, overlapped                     atomic.Int64
	dials, dialErrors, auths, authErrors    atomic.Int64
	full, age, idle, faulty                 atomic.Int64
}

// count counts the outcome of a Send.
func (c *counters) count(err error) {
	e, _ := err.(*Error)
	switch {
	case e == nil, e.Outcome == Accepted:
		c.accepted.Add(1)
	case e.Outcome == Unknown:
		c.unknown.Add(1)
	default:
		c.notAccepted.Add(1)
	}
	if e != nil {
		for _, r := range e.Recipients {
			if r.Outcome == NotAccepted && r.Reply.Code >= 400 && (e.Scope == ScopeRecipient || r.Reply != e.Reply) {
				c.refused.Add(1)
			}
		}
	}
}

// waitedSince counts a wait for a connection.
func (c *counters) waitedSince(began time.Time) {
	c.waits.Add(1)
	c.waited.Add(int64(time.Since(began)))
}

func (c *counters) countClose(why conn.Reason) {
	switch why {
	case conn.Full:
		c.full.Add(1)
	case conn.Age:
		c.age.Add(1)
	case conn.Idle:
		c.idle.Add(1)
	case conn.Fault:
		c.faulty.Add(1)
	}
}

func (p *pool) stats() Stats {
	c := &p.cfg.stats
	s := Stats{
		Name: p.cfg.Name, WaitCount: c.waits.Load(), WaitDuration: time.Duration(c.waited.Load()),
		Accepted: c.accepted.Load(), NotAccepted: c.notAccepted.Load(), Unknown: c.unknown.Load(), Refused: c.refused.Load(),
		Retries: c.retries.Load(), Overlapped: c.overlapped.Load(),
		Dials: c.dials.Load(), DialErrors: c.dialErrors.Load(), Auths: c.auths.Load(), AuthErrors: c.authErrors.Load(),
		ClosedFull: c.full.Load(), ClosedAge: c.age.Load(), ClosedIdle: c.idle.Load(), ClosedFaulty: c.faulty.Load(),
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s.MaxConns, s.OpenConns, s.IdleConns, s.Waiting = p.slots.limit(), p.slots.open, p.idle.Len, p.queue.len()
	return s
}
