package smtprelay

import (
	"context"
	"crypto/sha256"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// profile is what a Client has learnt about its relay. Each lesson has one method that teaches it and one that tells it:
//
//	taught by                            changes                                                  forgotten
//	OverlapFailed                        nothing is written behind a final dot                    never
//	RsetFailed                           EHLO takes the place of RSET                             never
//	AuthAnswered                         AUTH may lead a transaction (AuthMayBeFollowed)          never
//	AuthFollowedFailed                   AUTH travels alone                                       after an hour
//	SessionFull, SessionGoesOn           transactions on a connection (maxMessages)               after 10 minutes, or when disproved
//	rcptsTaken                           recipients in a transaction (maxRcpts)                   after 10 minutes
//	credentialsRefused                   the same credentials are not tried (RefusalOf)           after 30 seconds to 5 minutes
//	NoteDiscard                          chunks, DATA or a question for an address (DiscardsAt)   after an hour
//	nodes.failed                         an address is tried after the others (nodes.order)       after 30 seconds to 10 minutes, or when it works
//
// Each change is a lesson, which a Trace is told. It is safe for concurrent use.
type profile struct {
	lessons

	noOverlap atomic.Bool
	noRset    atomic.Bool
	proven    atomic.Bool   // the relay has accepted credentials
	authTurn  chan struct{} // held by who authenticates while they are not proven

	messages atomic.Int64 // after so many transactions the relay ended a connection with 421; 0: never. Written under mu

	mu            sync.Mutex // guards the fields below
	messagesTimes int        // how often in a row, with the same number
	messagesFirst time.Time  // when the first of these was
	messagesUntil time.Time

	discards map[string]discard // by remote address

	rcpts      rcptLimit
	rcptsUntil time.Time

	authAloneUntil time.Time

	badAuth      [sha256.Size]byte // mark of the credentials that were refused
	badAuthReply wire.Reply        // what the relay said; Code 0 if it has refused none
	badAuthAt    time.Time
	badAuthTimes int // how often these, in a row
	badAuthMarks int // how many different ones in a row
}

// learntFor is how long a limit is believed without being met again.
const learntFor = 10 * time.Minute

// OverlapFailed is told when the relay has refused or thrown away commands that stood behind a final dot. From then on a
// transaction begins when the one before has its final reply. Disabling overlap by mistake costs one round trip per message;
// leaving it on costs a timeout each time.
func (p *profile) OverlapFailed() {
	if !p.noOverlap.Swap(true) {
		p.learned(LearnedInfo{Lesson: LessonNoOverlap, Text: "the relay does not take commands behind a final dot: a message begins when the one before has its reply"})
	}
}

// Overlaps reports whether commands may follow a final dot, as far as is known.
func (p *profile) Overlaps() bool { return !p.noOverlap.Load() }

// RsetFailed is told when the relay does not know RSET. From then on EHLO clears an envelope away (RFC 5321, 4.1.4), which
// costs a round trip.
func (p *profile) RsetFailed() {
	if !p.noRset.Swap(true) {
		p.learned(LearnedInfo{Lesson: LessonNoRset, Text: "the relay does not know RSET: EHLO takes its place"})
	}
}

// ResetsByEHLO reports whether EHLO is to be said instead of RSET.
func (p *profile) ResetsByEHLO() bool { return p.noRset.Load() }

// AuthTurn waits until this connection may authenticate: at once where the relay has accepted credentials before, else one
// connection at a time, so that wrong ones are tried once. A turn ends after authTurnMost, if the relay has not answered by
// then. Who has had none after authTurnWait gets none: the relay answers nobody.
func (p *profile) AuthTurn(ctx context.Context) (done func(), ok bool) {
	if p.proven.Load() {
		return func() {}, true
	}
	timer := time.NewTimer(authTurnWait)
	defer timer.Stop()
	select {
	case p.authTurn <- struct{}{}:
		over := sync.OnceFunc(func() { <-p.authTurn })
		most := time.AfterFunc(authTurnMost, over)
		return func() { most.Stop(); over() }, true
	case <-timer.C:
		return func() {}, p.proven.Load()
	case <-ctx.Done():
		return func() {}, true // whatever comes next ends with ctx
	}
}

const (
	authTurnMost = 10 * time.Second
	authTurnWait = 25 * time.Second // less than Timeouts.Greeting, by which the first turn has an answer
)

// AuthFollowedFailed is told when an AUTH that had commands behind it, or the MAIL behind it, was refused, thrown away or
// answered with a challenge; r is the reply, if there was one. From then on AUTH is sent alone, before the first transaction:
// that costs a round trip for each connection.
func (p *profile) AuthFollowedFailed(r wire.Reply) (so bool) {
	if publicReply(r).says(saysTooManyConns, OpAuth) {
		return false // it would say so to an AUTH alone, too
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if !now.Before(p.authAloneUntil) {
		p.learned(LearnedInfo{Lesson: LessonAuthAlone, Reply: publicReply(r), Text: "the relay does not take commands behind AUTH: AUTH is sent alone"})
	}
	p.authAloneUntil = now.Add(authAloneFor)
	return true
}

// authAloneFor is how long AUTH is sent alone after that.
const authAloneFor = time.Hour

// AuthMayBeFollowed reports whether commands may follow AUTH in one write: the credentials are known to be right, so that a
// refusal is not about them, and it has not failed not long ago.
func (p *profile) AuthMayBeFollowed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.proven.Load() && !time.Now().Before(p.authAloneUntil)
}

// SessionFull is told when the relay has said r, a 421 perhaps, on a connection that had had n transactions and was opened at born. The
// same n twice in a row is the relay's limit; once may be a coincidence, such as a restart. From then on connections are
// retired after n.
//
// A connection that was open already when the first one was told so does not count: a relay that restarts tells them all. Nor
// does one that the relay ends because it was idle.
func (p *profile) SessionFull(n int, born time.Time, r wire.Reply) {
	if publicReply(r).says(idleTooLong, OpMail) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	switch {
	case int64(n) != p.messages.Load():
		p.messages.Store(int64(n))
		p.messagesTimes, p.messagesFirst = 1, now
	case !born.Before(p.messagesFirst):
		if p.messagesTimes++; p.messagesTimes == 2 {
			p.learned(LearnedInfo{Lesson: LessonMaxMessages, Limit: n, Text: fmt.Sprintf("the relay ends a connection after %d messages", n)})
		}
	}
	p.messagesUntil = now.Add(learntFor)
}

// SessionGoesOn is told when the relay has accepted the nth MAIL of a connection. If n is beyond what SessionFull has taught,
// that is forgotten: an overloaded relay that says 421 at random would otherwise teach smaller and smaller numbers.
func (p *profile) SessionGoesOn(n int) {
	if most := p.messages.Load(); most == 0 || int64(n) <= most {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if int64(n) > p.messages.Load() {
		if p.messagesTimes >= 2 {
			p.learned(LearnedInfo{Lesson: LessonMaxMessages, Text: "the relay takes more messages on a connection than it was thought to"})
		}
		p.messages.Store(0)
		p.messagesTimes = 0
	}
}

// maxMessages is the number of transactions after which the relay ends a connection; 0 means that it is not known.
func (p *profile) maxMessages() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.messagesTimes < 2 || time.Now().After(p.messagesUntil) {
		return 0
	}
	return int(p.messages.Load())
}

// rcptsTaken is told of a transaction that offered n recipients: the relay accepted some of them, and told some of the others
// that there were too many. It changes how many recipients go into the next transactions.
func (p *profile) rcptsTaken(n, accepted, tooMany int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.rcpts.most
	if p.rcpts.took(n, accepted, tooMany); p.rcpts.most != before {
		p.learned(LearnedInfo{Lesson: LessonMaxRecipients, Limit: p.rcpts.most, Text: fmt.Sprintf("the relay takes %d recipients in a transaction", p.rcpts.most)})
	}
	if tooMany > 0 {
		p.rcptsUntil = time.Now().Add(learntFor)
	}
}

// maxRcpts is what is known of the relay's limit of recipients in a transaction.
func (p *profile) maxRcpts() rcptLimit {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !time.Now().Before(p.rcptsUntil) {
		p.rcpts = rcptLimit{}
	}
	return p.rcpts
}

// rcptLimit is how many recipients a relay takes in one transaction, as its "too many recipients" tells. The zero value knows
// of no limit.
type rcptLimit struct {
	most int // 0 means that no limit is known
	full int // transactions in a row with most recipients that were all accepted
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

// took takes into account a transaction that offered n recipients; see [profile.rcptsTaken].
func (l *rcptLimit) took(n, accepted, tooMany int) {
	switch {
	case tooMany > 0 && accepted > 0:
		wait := 0
		if l.most > 0 && n > l.most && accepted >= l.most {
			wait = max(2*l.wait, firstProbe) // the limit has not changed
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

// credentialsRefused is told when the relay has refused credentials for good; mark identifies them. They are not sent again
// for a while, which doubles: some relays lock the account.
func (p *profile) credentialsRefused(mark [sha256.Size]byte, r wire.Reply) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.badAuthTimes++; p.badAuth != mark {
		p.badAuthTimes = 1
		p.badAuthMarks++
	}
	p.badAuth, p.badAuthReply, p.badAuthAt = mark, r, time.Now()
	p.learned(LearnedInfo{Lesson: LessonBadCredentials, Text: "the relay refuses the credentials: they are not tried for a while", Reply: publicReply(r)})
}

// freshTries is how many credentials that differ may be refused one after another, before any others wait too.
const freshTries = 4

// RefusalOf returns the relay's refusal of just these credentials if that is not long ago; or of others, where many were
// refused.
func (p *profile) RefusalOf(mark [sha256.Size]byte) (r wire.Reply, refused bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	pause := time.Duration(0)
	switch more := p.badAuthMarks - freshTries; {
	case p.badAuthTimes > 0 && p.badAuth == mark:
		pause = backoffUpTo(authPause, authPauseMost, p.badAuthTimes)
	case more >= 0:
		pause = backoffUpTo(authPause, freshPauseMost, more+1)
	}
	return p.badAuthReply, time.Now().Before(p.badAuthAt.Add(pause))
}

// discard is what an address has shown about the octets of a chunk that it refuses.
type discard struct {
	yes   bool // it throws them away
	until time.Time
}

const (
	discardFor  = time.Hour // how long that is believed: a node may be replaced
	discardMost = 256       // addresses remembered
)

// NoteDiscard is told what the relay at addr has shown. Bodies go in chunks to an address that discards the octets of a
// refused chunk, and by DATA to one that does not; an address that is not known is asked.
func (p *profile) NoteDiscard(addr string, yes bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.discards == nil || len(p.discards) >= discardMost {
		p.discards = make(map[string]discard)
	}
	before, known := p.discards[addr]
	p.discards[addr] = discard{yes, time.Now().Add(discardFor)}
	switch {
	case known && before.yes == yes:
	case yes:
		p.learned(LearnedInfo{Lesson: LessonChunks, Text: addr + " throws away a chunk that it refuses: bodies go in chunks"})
	default:
		p.learned(LearnedInfo{Lesson: LessonNoChunks, Text: addr + " does not throw away a chunk that it refuses: bodies go by DATA"})
	}
}

// DiscardsAt returns what the relay at addr has shown.
func (p *profile) DiscardsAt(addr string) (yes, known bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	d, ok := p.discards[addr]
	return d.yes, ok && time.Now().Before(d.until)
}

// relay is what connections ask and tell: the profile, the counters, and what replies mean. It implements [conn.Profile].
type relay struct {
	*profile
	stats *counters
}

// AuthAnswered implements [conn.Profile].
func (r relay) AuthAnswered(mark [sha256.Size]byte, reply wire.Reply, followed bool) {
	r.stats.auths.Add(1)
	if reply.Class() != 2 {
		r.stats.authErrors.Add(1)
	}
	switch {
	case reply.Class() == 2:
		r.proven.Store(true)
	case reply.Class() == 5 && !followed && !r.proven.Load() && !publicReply(reply).says(tooManyConns, OpAuth):
		r.credentialsRefused(mark, reply)
	}
}

// AuthGivenUp implements [conn.Profile].
func (r relay) AuthGivenUp() {
	r.stats.auths.Add(1)
	r.stats.authErrors.Add(1)
}

// Overlapped implements [conn.Profile].
func (r relay) Overlapped() { r.stats.overlapped.Add(1) }

// EndsSession implements [conn.Profile].
func (r relay) EndsSession(op conn.Step, reply wire.Reply, seq int, worked bool) bool {
	return publicReply(reply).endsSession(opOf(op), seq, worked)
}

// lessons tells the Trace what the profile learns. A lesson is learnt under locks of the pool or of a connection, which a hook
// may need, so a goroutine tells it; there is one while there is something to tell.
type lessons struct {
	tell func(LearnedInfo) // nil: nobody wants to know; set before the first lesson

	mu      sync.Mutex // guards the fields below; never held across tell
	queue   []LearnedInfo
	telling bool          // the goroutine runs
	done    chan struct{} // closed when it ends
}

const lessonsMost = 256 // lessons that wait to be told

// learned has info told. It takes no other lock and returns at once.
func (l *lessons) learned(info LearnedInfo) {
	if l.tell == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.queue) >= lessonsMost {
		return
	}
	l.queue = append(l.queue, info)
	if !l.telling {
		l.telling, l.done = true, make(chan struct{})
		go l.run()
	}
}

func (l *lessons) run() {
	for {
		l.mu.Lock()
		if len(l.queue) == 0 {
			l.telling = false
			close(l.done)
			l.mu.Unlock()
			return
		}
		info := l.queue[0]
		l.queue = l.queue[1:]
		l.mu.Unlock()
		l.tell(info)
	}
}

// told returns when all that was learnt has been told.
func (l *lessons) told() {
	l.mu.Lock()
	telling, done := l.telling, l.done
	l.mu.Unlock()
	if telling {
		<-done
	}
}
