package smtprelay

import (
	"crypto/sha256"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
)

// Limits are what the relay allows one client. They hold for one Client in one process: where several share the
// allowance, divide it. Where the relay announces less (LIMITS, RFC 9422), that wins.
type Limits struct {
	// MaxConns is how many connections are open at once, each counted until the relay has closed its side too.
	// 0 means 10, SendGrid's classic allowance; at most 10,000, and not negative.
	MaxConns int

	// MaxMessagesPerConn is how many transactions are made on a connection before it is replaced; refused ones count.
	// 0 means 100, SendGrid's classic allowance; negative means no limit.
	MaxMessagesPerConn int

	// MaxRecipients is how many recipients go into one transaction; a message for more goes in several. 0 means 1,000
	// (RFC 5321, 4.5.3.1.8 has relays take 100 at least); negative means as many as the relay takes.
	//
	// A relay that takes fewer and says so with "too many recipients" (452 or 552) is believed: for ten minutes transactions
	// have as many as it took, and now and then a few more to see whether it takes them. The default of 1,000 and what was
	// found out do not split a message with AllOrNothing, and the default not one whose Body can be written once only.
	MaxRecipients int

	// MaxInFlight is how many messages are on their way on one connection without final reply, with Config.Chunking and a relay
	// that offers it. More of them hide a longer round trip, and a lost connection leaves the fate of each unknown.
	// 0 means 4; 1 means that a lost connection leaves one unknown at most; at most 1,000, and not negative.
	MaxInFlight int

	// MaxConnAge is how long a connection is used, less a random part of up to a tenth, so that the connections of many
	// clients are not replaced at one moment. 0 means 5 minutes; negative means no limit.
	MaxConnAge time.Duration

	// MaxIdleTime is how long a connection stays open without use. 0 means 30 seconds, since some relays close after a
	// minute; negative means until the relay closes it.
	MaxIdleTime time.Duration
}

// withDefaults replaces zero by the default, and negative by 0, which means no limit from here on.
func (l Limits) withDefaults() Limits {
	l.MaxConns = orDefault(l.MaxConns, 10)
	l.MaxMessagesPerConn = orDefault(l.MaxMessagesPerConn, 100)
	l.MaxRecipients = orDefault(l.MaxRecipients, 0)
	l.MaxInFlight = orDefault(l.MaxInFlight, 4)
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
}

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

// learnt is what a Client has found out about its relay. It is safe for concurrent use.
type learnt struct {
	noOverlap atomic.Bool // the relay does not take what stands behind a final dot
	authAlone atomic.Bool // it does not take commands behind AUTH

	messages atomic.Int64 // after so many transactions the relay ended a session with 421; 0 means it never did. Written under mu

	mu    sync.Mutex // guards the fields below
	times int        // in a row, with the same number
	told  time.Time  // when it did so first
	until time.Time  // when that is forgotten

	discards map[string]discard // by remote address; see chunking.go

	rcpts      rcptLimit // as the last transactions have shown it
	rcptsUntil time.Time // when that is forgotten

	badAuth      [sha256.Size]byte // of the credentials that the relay has refused
	badAuthError *Error            // what it said; nil if it has refused none
	badAuthUntil time.Time         // when they may be tried again
}

// rcptLimit is how many recipients a relay takes in one transaction, as its "too many recipients" tells. The zero value knows
// of no limit.
type rcptLimit struct {
	most int // 0 means that no limit is known
	full int // transactions in a row with most recipients that were taken
	wait int // how many of those before a few more are offered
}

// A few more recipients are offered in the transaction after the one that has shown the limit, then after firstProbe full
// ones, and after twice as many each time that they are refused. What is refused costs a RCPT, and relays hang up on many
// refusals: maxProbe is how many more are offered at most.
const firstProbe, maxProbe = 8, 8

// offer is how many recipients, of n, go into the next transaction.
func (l rcptLimit) offer(n int) int {
	switch {
	case l.most == 0 || n <= l.most:
		return n
	case l.full < l.wait:
		return l.most
	}
	return min(n, l.most+min(max(l.most/8, 1), maxProbe))
}

// took takes into account a transaction to which n recipients were offered; the relay accepted some of them, and told some of
// the others that there were too many.
func (l *rcptLimit) took(n, accepted, tooMany int) {
	switch {
	case tooMany > 0 && accepted > 0:
		wait := 0
		if l.most > 0 && n > l.most && accepted >= l.most {
			wait = max(2*l.wait, firstProbe) // the limit is what it was
		}
		*l = rcptLimit{most: accepted, wait: wait}
	case tooMany > 0:
		l.most *= 2 // it is not the number, but each recipient: they are all told so in a few transactions
	case l.most > 0 && n > l.most:
		*l = rcptLimit{most: n}
	case l.most > 0 && n == l.most:
		l.full++
	}
}

// maxRcpts is what is known of the relay's limit for a transaction.
func (l *learnt) maxRcpts() rcptLimit {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !time.Now().Before(l.rcptsUntil) {
		l.rcpts = rcptLimit{}
	}
	return l.rcpts
}

// rcptsTaken is rcptLimit.took for all later messages.
func (l *learnt) rcptsTaken(n, accepted, tooMany int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rcpts.took(n, accepted, tooMany)
	if tooMany > 0 {
		l.rcptsUntil = time.Now().Add(learntFor)
	}
}

// sessionFull notes that the relay said 421 to a session that had had n transactions. The same number twice in a row is
// taken for its limit: once may be a coincidence, such as a relay that is shut down.
//
// A session that was open already when another one was told so teaches nothing: a relay that is shut down tells them all. And
// if one goes beyond that number in between, it is no limit: a relay that says 421 at random, being overloaded, would
// otherwise teach smaller and smaller numbers.
func (l *learnt) sessionFull(n int, born time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	switch {
	case int64(n) != l.messages.Load():
		l.messages.Store(int64(n))
		l.times, l.told = 1, now
	case !born.Before(l.told):
		l.times++
	}
	l.until = now.Add(learntFor)
}

// maxMessages is the number of transactions after which the relay ends a session; 0 means that it is not known.
func (l *learnt) maxMessages() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.times < 2 || time.Now().After(l.until) {
		return 0
	}
	return int(l.messages.Load())
}

// sessionGoesOn notes that the relay has taken MAIL as the nth of a session.
func (l *learnt) sessionGoesOn(n int) {
	if most := l.messages.Load(); most == 0 || int64(n) <= most {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if int64(n) > l.messages.Load() {
		l.messages.Store(0)
		l.times = 0
	}
}

// learntFor is how long a limit that was learnt is believed without being met again.
const learntFor = 10 * time.Minute
