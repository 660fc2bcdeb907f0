package smtprelay

import (
	"math/rand/v2"
	"time"

	"golang.org/x/sync/semaphore"
)

// NoLimit, in a field of [Limits], [Timeouts] or [Retry], means no limit where the field allows that; so does any negative value.
const NoLimit = -1

// Limits are what the relay allows one client. They hold for one Client in one process: where several share the
// allowance, divide it, or share its connections by Slots. Where the relay announces less (LIMITS, RFC 9422), that wins.
type Limits struct {
	_ [0]func() // not comparable, so that it may grow

	// MaxConns is how many connections are open at once, each counted until the relay has closed its side too.
	// 0 means 10, SendGrid's classic allowance; at most 10,000, and not negative.
	MaxConns int

	// Slots, if not nil, is asked for a place before each connection is opened: an allowance that is shared with other
	// processes or machines. MaxConns holds beside it. A connection that is idle keeps its place, for MaxIdleTime at most, unless that is wanted back.
	Slots Slots

	// MaxMessagesPerConn is how many transactions are made on a connection before it is replaced; refused ones count.
	// 0 means 100, SendGrid's classic allowance; [NoLimit] means no limit.
	MaxMessagesPerConn int

	// MaxRecipients is how many recipients go into one transaction; a message for more goes in several. 0 means 1,000
	// (RFC 5321, 4.5.3.1.8 has relays take 100 at least); [NoLimit] means as many as the relay takes.
	//
	// A relay that takes fewer and says so with "too many recipients" (452 or 552) is believed: for ten minutes transactions
	// have as many as it took, and now and then a few more to see whether it takes them. The default of 1,000 and what was
	// found out do not split a message with AllOrNothing, and the default not one whose Body can be written once only.
	MaxRecipients int

	// MaxWaiting is how many Sends wait for a connection at once; one more ends at once with [ErrBusy], its message not
	// accepted. SendAll waits instead. 0 means any number; not negative.
	MaxWaiting int

	// Rate is how many messages a second are begun, on all connections together. 0 means any number, until the relay says that
	// they come too fast (454, 450 and others, in many words): the Client finds out the pace that the relay takes then, and a
	// message that was refused for that is sent again at that pace, before all others. A number is kept from the start. Negative
	// means that such a reply is told to the caller.
	Rate float64

	// MaxConnAge is how long a connection is used, less a random part of up to a tenth, so that the connections of many
	// clients are not replaced at one moment. 0 means 5 minutes; [NoLimit] means none.
	MaxConnAge time.Duration

	// MaxIdleTime is how long a connection stays open without use. 0 means 30 seconds, since some relays close after a
	// minute; [NoLimit] means until the relay closes it.
	MaxIdleTime time.Duration
}

// withDefaults replaces zero by the default, and negative by 0, which means no limit from here on.
func (l Limits) withDefaults() Limits {
	l.MaxConns = orDefault(l.MaxConns, 10)
	l.MaxMessagesPerConn = orDefault(l.MaxMessagesPerConn, 100)
	l.MaxRecipients = orDefault(l.MaxRecipients, 0)
	l.MaxConnAge = orDefault(l.MaxConnAge, 5*time.Minute)
	l.MaxIdleTime = orDefault(l.MaxIdleTime, 30*time.Second)
	return l
}

func orDefault[T int | time.Duration](v, def T) T {
	switch {
	case v == 0:
		return def
	case v < 0:
		return 0
	}
	return v
}

// slots counts open connections against the cap. Some may be held back while the relay says that there are too many. It
// is guarded by the pool's lock.
type slots struct {
	sem  *semaphore.Weighted
	max  int
	open int // taken for connections
	held int // taken by nobody, so that the cap is lower
	owed int // to be held back once they are freed

	raiseAfter time.Duration // how long the cap stays as low as it is
	raiseAt    time.Time     // when it goes up by one; zero means that it is not lowered
	raised     bool          // since it was lowered last
}

const (
	crowdWait     = 30 * time.Second // before a connection more is tried after "too many connections"; doubles
	crowdWaitMost = 10 * time.Minute
)

func newSlots(max int) *slots {
	return &slots{sem: semaphore.NewWeighted(int64(max)), max: max}
}

// limit is the cap in force.
func (s *slots) limit() int { return s.max - s.held - s.owed }

// take takes a slot for a connection that is about to be dialled.
func (s *slots) take() bool {
	if !s.sem.TryAcquire(1) {
		return false
	}
	s.open++
	return true
}

// free gives back the slot of a connection that the relay has closed, or that was never opened.
func (s *slots) free() {
	if s.open--; s.open < 0 {
		panic("smtprelay: bug: slot freed twice")
	}
	if s.owed > 0 {
		s.owed--
		s.held++
		return
	}
	s.sem.Release(1)
}

// lower brings the cap down to limit, at least 1, where it is above.
func (s *slots) lower(limit int) {
	for limit = max(limit, 1); s.limit() > limit; {
		if s.sem.TryAcquire(1) {
			s.held++
		} else {
			s.owed++
		}
	}
}

// raise brings the cap up by one and reports whether it is still below the configured one.
func (s *slots) raise() (lowered bool) {
	switch {
	case s.owed > 0:
		s.owed--
	case s.held > 0:
		s.held--
		s.sem.Release(1)
	}
	return s.held+s.owed > 0
}

// crowded lowers the cap for a while to the number of connections that work or may yet: the relay has said that there are too
// many. It reports false if that is no news.
func (s *slots) crowded(working int, now time.Time) bool {
	if s.limit() <= max(working, 1) && !s.raiseAt.IsZero() {
		return false // one of several that were refused together
	}
	s.lower(working)
	switch {
	case s.raiseAfter == 0:
		s.raiseAfter = crowdWait
	case s.raised: // too soon
		s.raiseAfter = min(2*s.raiseAfter, crowdWaitMost)
	}
	s.raised = false
	// A random part more, so that clients that share an allowance do not come back together.
	s.raiseAt = now.Add(s.raiseAfter + rand.N(s.raiseAfter/4))
	return true
}

// raiseDue brings a cap that was lowered up by one if its time has come.
func (s *slots) raiseDue(now time.Time) {
	if s.raiseAt.IsZero() || now.Before(s.raiseAt) {
		return
	}
	s.raised = true
	if s.raise() {
		s.raiseAt = now.Add(s.raiseAfter)
	} else {
		s.raiseAt, s.raiseAfter = time.Time{}, 0
	}
}
