package smtprelay

import (
	"context"
	"crypto/sha256"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smtprelay/smtprelay/internal/backoff"
	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// profile is what a Client has learned about its relay. Each lesson has one method that records it and one that reads it:
//
//	recorded by                          changes                                                  forgotten
//	OverlapFailed                        nothing is written after a final dot                    never
//	RsetFailed                           EHLO takes the place of RSET                             never
//	AuthAnswered                         AUTH may lead a transaction (AuthMayBeFollowed)          never
//	AuthFollowedFailed                   AUTH is sent alone                                       after an hour
//	SessionFull, SessionGoesOn           transactions on a connection (maxMessages)               after 10 minutes, or when disproved
//	rcptsTaken                           recipients in a transaction (maxRcpts)                   after 10 minutes
//	credentialsRefused                   the same credentials are not tried (RefusalOf)           after 30 seconds to 5 minutes
//	NoteDiscard                          chunks, DATA or a probe for an address (DiscardsAt)      after an hour
//	nodes.Failed                         an address is tried after the others (nodes.Order)       after 30 seconds to 10 minutes, or when it works
//
// Each change is reported to Trace.Learned. A profile is safe for concurrent use.
type profile struct {
	lessons

	noOverlap atomic.Bool
	noRset    atomic.Bool
	proven    atomic.Bool   // the relay has accepted credentials
	authTurn  chan struct{} // semaphore: held by the connection that authenticates, until proven is set

	messages atomic.Int64 // number of transactions after which the relay ended a connection; 0: unknown. Written under mu

	mu            sync.Mutex // guards the fields below
	messagesTimes int        // how often messages was seen consecutively
	messagesFirst time.Time  // when messages was first seen
	messagesUntil time.Time  // when messages is forgotten

	discards map[string]discard // by remote address

	rcpts      rcptLimit
	rcptsUntil time.Time

	authAloneUntil time.Time

	badAuth      [sha256.Size]byte // hash of the credentials that were refused last
	badAuthReply wire.Reply        // the refusal; Code 0 if there was none
	badAuthAt    time.Time
	badAuthTimes int // consecutive refusals of these credentials
	badAuthMarks int // consecutive refusals of different credentials
}

// learntFor is how long a limit is remembered unless the relay confirms it.
const learntFor = 10 * time.Minute

// OverlapFailed records that the relay has refused or discarded commands after a final dot. From then on, a transaction begins
// after the previous one has its final reply. Disabling overlap by mistake costs one round trip per message; leaving it on costs
// a timeout each time.
func (p *profile) OverlapFailed() {
	if !p.noOverlap.Swap(true) {
		p.learned(LearnedInfo{Lesson: LessonNoOverlap, Text: "the relay does not accept commands after a final dot: each message waits for the reply to the previous one"})
	}
}

// Overlaps reports whether commands may follow a final dot: true unless OverlapFailed was called.
func (p *profile) Overlaps() bool { return !p.noOverlap.Load() }

// RsetFailed records that the relay does not know RSET. From then on, EHLO resets an envelope (RFC 5321, 4.1.4), which costs a
// round trip.
func (p *profile) RsetFailed() {
	if !p.noRset.Swap(true) {
		p.learned(LearnedInfo{Lesson: LessonNoRset, Text: "the relay does not know RSET: EHLO is sent instead"})
	}
}

// ResetsByEHLO reports whether to send EHLO instead of RSET.
func (p *profile) ResetsByEHLO() bool { return p.noRset.Load() }

// AuthTurn waits until this connection may authenticate. Until the relay has accepted credentials, one connection at a time
// authenticates, so that wrong credentials are tried once. A turn ends after authTurnMost even if the relay has not replied.
// AuthTurn returns false after authTurnWait: the relay replies to no AUTH.
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
		return func() {}, true // the next step fails because of ctx
	}
}

const (
	authTurnMost = 10 * time.Second
	authTurnWait = 25 * time.Second // less than Timeouts.Greeting, which limits the reply to the first AUTH
)

// AuthFollowedFailed records that an AUTH with commands pipelined after it, or the MAIL after AUTH, was refused, discarded or
// answered with a challenge. r is the reply, if there was one. From then on, AUTH is sent alone, which costs a round trip per
// connection.
func (p *profile) AuthFollowedFailed(r wire.Reply) (so bool) {
	if publicReply(r).says(saysTooManyConns, OpAuth) {
		return false // an AUTH sent alone would get the same reply
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if !now.Before(p.authAloneUntil) {
		p.learned(LearnedInfo{Lesson: LessonAuthAlone, Reply: publicReply(r), Text: "the relay does not accept commands after AUTH: AUTH is sent alone"})
	}
	p.authAloneUntil = now.Add(authAloneFor)
	return true
}

// authAloneFor is how long AUTH is sent alone after AuthFollowedFailed.
const authAloneFor = time.Hour

// AuthMayBeFollowed reports whether commands may follow AUTH in one write: the relay has accepted the credentials before, and
// pipelining after AUTH has not failed within authAloneFor.
func (p *profile) AuthMayBeFollowed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.proven.Load() && !time.Now().Before(p.authAloneUntil)
}

// SessionFull records that the relay ended a connection, opened at born, after n transactions; r is the reply that ended it. The
// same n twice in a row is the relay's limit; once may be a coincidence, such as a restart. From then on, connections are
// retired after n transactions.
//
// The second connection must have been opened after the first one ended, because a relay that restarts ends all connections. A
// connection that the relay ends because it was idle does not count.
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

// SessionGoesOn records that the relay has accepted the nth MAIL of a connection. If n exceeds the limit that SessionFull has
// recorded, the limit is forgotten. Otherwise, an overloaded relay that replies 421 at random would lower the limit again and
// again.
func (p *profile) SessionGoesOn(n int) {
	if most := p.messages.Load(); most == 0 || int64(n) <= most {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if int64(n) > p.messages.Load() {
		if p.messagesTimes >= 2 {
			p.learned(LearnedInfo{Lesson: LessonMaxMessages, Text: "the relay accepts more messages on a connection than the limit learned before"})
		}
		p.messages.Store(0)
		p.messagesTimes = 0
	}
}

// maxMessages returns the number of transactions after which the relay ends a connection; 0 means unknown.
func (p *profile) maxMessages() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.messagesTimes < 2 || time.Now().After(p.messagesUntil) {
		return 0
	}
	return int(p.messages.Load())
}

// rcptsTaken records a transaction with n recipients, of which the relay accepted some and refused tooMany as "too many
// recipients". It adjusts the number of recipients in later transactions.
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

// maxRcpts returns what the profile knows of the relay's limit of recipients in a transaction.
func (p *profile) maxRcpts() rcptLimit {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !time.Now().Before(p.rcptsUntil) {
		p.rcpts = rcptLimit{}
	}
	return p.rcpts
}

// rcptLimit is the number of recipients that a relay accepts in one transaction, learned from "too many recipients". The zero
// value means that no limit is known.
type rcptLimit struct {
	most int // the limit; 0 means unknown
	full int // consecutive transactions with most recipients, all accepted
	wait int // value of full from which more than most recipients are offered
}

// The transaction after the one that has shown the limit offers a few more recipients, as a probe. The next probe follows after
// firstProbe full transactions, and then after twice as many each time that a probe is refused. A probe has at most maxProbe
// more recipients: each refusal costs a RCPT, and relays close connections after many refusals.
const firstProbe, maxProbe = 8, 8

// offer returns how many of n recipients go into the next transaction.
func (l rcptLimit) offer(n int) int {
	switch {
	case l.most == 0 || n <= l.most:
		return n
	case l.full < l.wait:
		return l.most
	}
	return min(n, l.most+min(max(l.most/8, 1), maxProbe))
}

// took updates the limit after a transaction with n recipients; see [profile.rcptsTaken].
func (l *rcptLimit) took(n, accepted, tooMany int) {
	switch {
	case tooMany > 0 && accepted > 0:
		wait := 0
		if l.most > 0 && n > l.most && accepted >= l.most {
			wait = max(2*l.wait, firstProbe) // the limit has not changed
		}
		*l = rcptLimit{most: accepted, wait: wait}
	case tooMany > 0:
		l.most *= 2 // the relay refused every recipient, so their number is not the reason: fewer transactions collect all refusals
	case l.most > 0 && n > l.most:
		*l = rcptLimit{most: n}
	case l.most > 0 && n == l.most:
		l.full++
	}
}

// credentialsRefused records that the relay has refused credentials permanently; mark identifies them. They are not sent again
// for a pause that doubles each time, because some relays lock the account.
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

// freshTries is how many different credentials may be refused consecutively before new credentials have to wait too.
const freshTries = 4

// RefusalOf returns the relay's refusal of these credentials, if they are paused. After freshTries different credentials, any
// credentials are paused, and RefusalOf returns the last refusal.
func (p *profile) RefusalOf(mark [sha256.Size]byte) (r wire.Reply, refused bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	pause := time.Duration(0)
	switch more := p.badAuthMarks - freshTries; {
	case p.badAuthTimes > 0 && p.badAuth == mark:
		pause = backoff.Doubled(authPause, authPauseMost, p.badAuthTimes)
	case more >= 0:
		pause = backoff.Doubled(authPause, freshPauseMost, more+1)
	}
	return p.badAuthReply, time.Now().Before(p.badAuthAt.Add(pause))
}

// discard says whether an address discards the octets of a chunk that it refuses.
type discard struct {
	yes   bool // the address discards them
	until time.Time
}

const (
	discardFor  = time.Hour // how long a discard is remembered: a node may be replaced
	discardMost = 256       // maximum number of addresses remembered
)

// NoteDiscard records whether the relay at addr discards the octets of a chunk that it refuses. If so, bodies are sent to addr
// in chunks, otherwise with DATA. An unknown address is probed.
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
		p.learned(LearnedInfo{Lesson: LessonChunks, Text: addr + " discards a chunk that it refuses: bodies are sent in chunks"})
	default:
		p.learned(LearnedInfo{Lesson: LessonNoChunks, Text: addr + " does not discard a chunk that it refuses: bodies are sent with DATA"})
	}
}

// DiscardsAt returns what NoteDiscard has recorded for addr.
func (p *profile) DiscardsAt(addr string) (yes, known bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	d, ok := p.discards[addr]
	return d.yes, ok && time.Now().Before(d.until)
}

// relay implements [conn.Profile] with the profile, the counters and the meaning of replies.
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

// lessons calls Trace.Learned. Lessons are recorded while locks of the pool or of a connection are held, which the hook may
// need, so a goroutine calls the hook. The goroutine runs while the queue is not empty.
type lessons struct {
	tell func(LearnedInfo) // nil: there is no hook; set before the first lesson

	mu      sync.Mutex // guards the fields below; never held across tell
	queue   []LearnedInfo
	telling bool          // the goroutine is running
	done    chan struct{} // closed when the goroutine ends
}

const lessonsMost = 256 // maximum length of the queue; further lessons are dropped

// learned queues info for the hook. It takes no other lock and does not block.
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

// told waits until the queue is empty.
func (l *lessons) told() {
	l.mu.Lock()
	telling, done := l.telling, l.done
	l.mu.Unlock()
	if telling {
		<-done
	}
}
