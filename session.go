package smtprelay

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/scrub"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// exchange is a command whose reply is outstanding.
type exchange struct {
	op    Op
	final bool          // its reply decides over the message
	end   int64         // the position behind the octets that must leave for a reply to come
	tx    *transaction  // told of the reply; nil for QUIT
	rcpt  int           // which recipient, for OpRcpt
	limit time.Duration // for the reply, counted from when no other is awaited before it and end has left; 0 means none
	first bool          // of what was written behind a final dot that had no reply yet
}

// session is one connection, from the EHLO that made it ready to its close.
//
// Its write side belongs to whoever took it from the pool, one at a time. Its read loop runs as long as the connection and
// hands each reply to the oldest exchange outstanding, by counting only. Who writes a command appends its exchange first.
//
// It ends in two steps. It is doomed when something happens after which nothing may be written any more: a fault, a 421, a
// transaction that was given up before its final dot. Then it lives on until the final replies that are outstanding are
// in, and is done.
type session struct {
	id      int64
	cfg     *settings
	raw     *progressConn
	conn    net.Conn             // raw, or TLS on it
	tls     *tls.ConnectionState // nil in the clear
	addr    string               // of the relay, IP and port, where it offers chunks
	ext     wire.Extensions      // of the last EHLO
	born    time.Time
	expires time.Time // when it is too old to be used; zero means never
	limit   int       // transactions; 0 means any number
	round   int       // of the dial gate, when this one was dialled

	changed func(*session) // told when a final reply is in, or the session is doomed; called without mu
	closed  func(*session) // told when the relay has closed the connection; the last thing that happens
	sendOff func()         // sendAway, in a goroutine that the pool waits for

	replies *wire.ReplyReader // owned by the read loop
	said    scrub.Stream      // what they repeat of the credentials is taken out

	out      *bufio.Writer       // owned by the holder of the write side, as are the fields down to domains
	body     wire.BodyWriter     // on out
	line     []byte              // scratch
	lead     []byte              // an AUTH command that is still to be sent, in front of the first transaction
	leadMark [sha256.Size]byte   // of the credentials in lead
	domains  map[string]struct{} // of recipients so far, if the relay limits their number
	chunked  bool                // bodies may go in chunks (RFC 3030); set before the first transaction
	inStep   bool                // the relay has answered an envelope in step, so a chunk may leave with its envelope

	sent   chan struct{} // has room for one; told by sendAway
	parted atomic.Bool   // sendAway and the owner who waits for it go separate ways: whoever sets it is first
	doomed chan struct{} // closed when cause is set
	done   chan struct{} // closed when no reply will be read any more

	mu          sync.Mutex // guards the fields below; never held across I/O
	waiting     []exchange // oldest first, from head on
	head        int
	written     int64       // octets that were handed to the connection; changed by the holder of the write side, who alone reads it without mu
	attempted   int64       // the same, and those that are just being
	writing     bool        // some are just being
	wrote       sync.Cond   // on mu: writing is over
	pending     int         // final replies outstanding
	used        int         // transactions begun
	failed      int         // transactions that came to nothing, in a row
	open        bool        // the relay may have a transaction open: RSET leads the next
	unended     bool        // the last one was given up before its end
	quitting    bool        // QUIT was written
	retired     closeReason // no further transaction is begun; "" while it may be used
	cause       error       // why it was doomed
	writeErr    error       // what a write failed with
	closeBy     time.Time   // when the relay's last words must be in
	heard       time.Time   // when the relay last answered
	deadline    time.Time   // the read deadline in force
	said421     bool        // the relay has, to a command
	tooMany     bool        // AUTH was refused since there are too many connections
	abort       bool        // closed by Close: the relay is not waited for
	hangingUp   bool        // the read loop is through, and has a deadline of its own for the relay's close
	leftInOrder bool        // the relay has closed the connection, and nothing that it said is missing
	overlapped  bool        // the relay has answered, in full, an envelope that left in one write with the end before it
	outOfStep   bool        // a reply cannot be that to its command, so those behind it are to others too
}

// closeReason tells why a session takes no further transaction.
type closeReason string

const (
	closeFull   closeReason = "full"
	closeAge    closeReason = "age"
	closeIdle   closeReason = "idle"
	closeClosed closeReason = "closed"
	closeFault  closeReason = "fault"
)

// status is what the pool wants to know of a session whose write side nobody holds.
type status int

const (
	statusFree         status = iota // a transaction may be begun
	statusOverlappable               // one may be begun behind the final dot of the one before
	statusBusy                       // none may be begun until a final reply is in
	statusRetired                    // none may be begun any more: QUIT is due
	statusDoomed                     // none may be begun any more, and nothing is to be done
)

func (s *session) status(now time.Time) status {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.retired == "" && s.used > 0 && !s.expires.IsZero() && !now.Before(s.expires) {
		s.retired = closeAge // one that took longer to get ready has its message all the same, or none ever got through
	}
	switch {
	case s.cause != nil, s.writeErr != nil:
		return statusDoomed
	case s.retired != "" && s.pending > 0:
		return statusBusy
	case s.retired != "":
		return statusRetired
	case s.pending == 0:
		return statusFree
	case s.overlaps() && s.pending < s.inFlightLocked():
		return statusOverlappable
	}
	return statusBusy
}

// pipelining reports whether commands may be written without awaiting the reply to the one before.
func (s *session) pipelining() bool {
	return s.cfg.Pipelining != PipelineOff && s.ext.Has("PIPELINING")
}

// overlaps reports whether commands may be written behind a final dot.
func (s *session) overlaps() bool {
	return s.cfg.Pipelining == PipelineAcross && s.ext.Has("PIPELINING") && s.cfg.profile.overlaps()
}

// inFlightLocked is how many messages may be on their way whose final reply is not in. With DATA it is two: the next one's
// body waits for a 354 that comes behind that reply. In chunks it is MaxInFlight, once the relay has shown on this connection
// that it answers what leaves together with the end of a message.
func (s *session) inFlightLocked() int {
	switch {
	case !s.chunked:
		return 2
	case !s.overlapped:
		return min(2, s.cfg.Limits.MaxInFlight)
	}
	return s.cfg.Limits.MaxInFlight
}

// usable reports whether transactions may be begun yet, now or later.
func (s *session) usable() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.retired == "" && (s.limit == 0 || s.used < s.limit)
}

// lastRoom is how many more transactions may be begun on a session that is in the last fifth of its life; 0 on another, and
// on one that was not heard of since.
func (s *session) lastRoom(since time.Time) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	left := s.limit - s.used
	if s.retired != "" || s.limit == 0 || left > s.limit/5 || s.heard.Before(since) {
		return 0
	}
	return left
}

// atFault reports whether the session ends early, once the messages that are on their way have come to their end.
func (s *session) atFault() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.retired == closeFault
}

// wasTooMany reports whether the relay has refused the session since there are too many.
func (s *session) wasTooMany() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tooMany
}

// retire makes the session take no further transaction.
func (s *session) retire(why closeReason) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.retired == "" {
		s.retired = why
	}
}

// Reading.

// readLoop runs until the connection has ended. It alone reads.
func (s *session) readLoop() {
	var err error
	for more := true; more; {
		var r wire.Reply
		if r, _, err = s.readReply(false); err != nil {
			break
		}
		more = s.deliver(r)
	}
	s.mu.Lock()
	s.doomLocked(s.lossLocked(err))
	s.mu.Unlock()
	s.raw.interrupt()
	s.mu.Lock()
	for s.writing { // until then nobody knows what has left
		s.wrote.Wait()
	}
	wait := s.cfg.Timeouts.Quit
	waited := s.quitting && (s.head == len(s.waiting) || s.waiting[s.head].op == OpQuit)
	if s.abort || waited && s.writeErr == nil && isTimeout(err) && s.deadline != longAgo {
		wait = 0 // QUIT had its time already
	}
	s.hangingUp, s.leftInOrder = true, errors.Is(err, io.EOF)
	s.mu.Unlock()
	close(s.done)
	s.changed(s)

	// A clean end of TLS is not yet the close of the connection below.
	if _, onTLS := s.conn.(*tls.Conn); closedByPeer(err) && !onTLS {
		s.raw.Close()
	} else {
		s.raw.hangUp(wait)
	}
	s.closed(s)
}

// deliver gives r to the oldest exchange outstanding and reports whether there is more to read.
func (s *session) deliver(r wire.Reply) (more bool) {
	s.traceReply(r)
	s.mu.Lock()
	if s.earlyLocked(r) {
		s.doomLocked(&conn.UnexpectedReply{Reply: r})
		s.mu.Unlock()
		return false
	}
	s.heard = time.Now()
	x := s.waiting[s.head]
	s.waiting[s.head] = exchange{}
	s.head++
	if s.head == len(s.waiting) {
		s.waiting, s.head = s.waiting[:0], 0
	}
	if (x.op == OpMail || x.op == OpRset) && x.tx.seq > 1 && (r.Code == 421 || x.op == OpMail && publicReply(r).says(tooManyMessages, x.op)) {
		s.cfg.profile.sessionFull(x.tx.seq-1, s.born)
	} else if x.op == OpMail && r.Class() == 2 {
		s.cfg.profile.sessionGoesOn(x.tx.seq)
	}
	if r.Code == 421 && x.op != OpQuit {
		// The relay is leaving, whatever it may still say to what was sent already.
		s.said421 = true
		s.hurryLocked(s.cfg.Timeouts.Quit)
		s.doomLocked(&conn.ReplyError{Step: conn.Step(x.op), Reply: r})
	}
	if x.tx != nil {
		x.tx.replyLocked(x, r)
	} else if x.first && r.Code == 503 {
		s.cfg.profile.overlapFailed()
	}
	if x.op == OpQuit {
		// What is left is to see the relay's close.
		s.hurryLocked(s.cfg.Timeouts.Quit)
	}
	if x.final {
		s.pending--
	}
	if next := s.replies.Peek(); next != 0 && s.head == len(s.waiting) {
		switch {
		case x.final && next/100 != r.Class() && next != 421 && next != 221:
			x.tx.contradicted = true
		case !x.final && next < 400:
			s.doomLocked(errExtraReply) // before anybody acts on replies that may be those to other commands
		}
	}
	s.armLocked()
	more = !s.outOfStep && (s.cause == nil || s.dueLocked())
	s.mu.Unlock()

	if x.final {
		if more {
			s.changed(s)
		}
		// Second: a sender who has another message at once is to find this session idle, and not to open one more.
		s.mu.Lock()
		x.tx.told = true
		x.tx.wake()
		s.mu.Unlock()
	}
	return more
}

// earlyLocked reports whether r comes before the command that it would answer has left. No relay can answer that, so r is
// one reply too many, and all replies behind it would be taken for those to other commands. A refusal is believed: a relay may
// refuse a message of which it has not read the end.
func (s *session) earlyLocked(r wire.Reply) bool {
	return s.head == len(s.waiting) || r.Class() < 4 && s.waiting[s.head].end > s.attempted
}

// errExtraReply ends a session whose relay has sent more replies than it was given commands.
var errExtraReply = errors.New("the relay sent a reply too many")

// readReply reads a reply, long if it may carry data. From here on nobody sees what the relay repeats of the credentials, but for what was read raw.
func (s *session) readReply(long bool) (r wire.Reply, raw string, err error) {
	read := s.replies.ReadReply
	if long {
		read = s.replies.ReadLong
	}
	if r, err = read(); err != nil {
		if m, ok := errors.AsType[*wire.MalformedError](err); ok {
			err = &wire.MalformedError{Line: s.said.Scrub(m.Line)}
		}
		return r, "", err
	}
	raw = r.Text
	r.Text = s.said.Scrub(raw)
	return r, raw, nil
}

// traceReply tells of a reply before anybody acts on it.
func (s *session) traceReply(r wire.Reply) {
	t := s.cfg.Trace
	if t == nil || t.Reply == nil {
		return
	}
	var x exchange
	ctx := context.Background()
	s.mu.Lock()
	if s.head < len(s.waiting) {
		if x = s.waiting[s.head]; x.tx != nil {
			ctx = x.tx.ctx
		}
	}
	s.mu.Unlock()
	t.Reply(ctx, s.id, x.op, publicReply(r))
}

// armLocked sets the read deadline to that of the oldest exchange outstanding.
func (s *session) armLocked() {
	if s.hangingUp {
		return
	}
	var at time.Time
	switch {
	case s.cause != nil && !s.dueLocked():
		at = longAgo
	case s.head < len(s.waiting):
		if x := s.waiting[s.head]; x.limit > 0 && x.end <= s.written {
			at = time.Now().Add(x.limit)
		}
	}
	if !s.closeBy.IsZero() && (at.IsZero() || s.closeBy.Before(at)) {
		at = s.closeBy
	}
	if at != s.deadline {
		s.deadline = at
		s.raw.SetReadDeadline(at)
	}
}

// dueLocked reports whether a doomed session still has a final reply to come: not to a final dot that never left, or left
// in part.
func (s *session) dueLocked() bool {
	return slices.ContainsFunc(s.waiting[s.head:], func(x exchange) bool { return x.final && x.end <= s.attempted })
}

// hurryLocked bounds how long the relay is listened to from now on.
func (s *session) hurryLocked(d time.Duration) {
	if by := time.Now().Add(d); s.closeBy.IsZero() || by.Before(s.closeBy) {
		s.closeBy = by
	}
}

// lossLocked turns err, with which reading ended, into the reason why the session is lost.
func (s *session) lossLocked(err error) error {
	if s.writeErr != nil && (err == nil || isTimeout(err) || closedByPeer(err)) {
		return s.writeErr // the cause, of which the end of reading is a consequence
	}
	if err == nil || s.head == len(s.waiting) {
		return err
	}
	x := s.waiting[s.head]
	if !isTimeout(err) {
		return err
	}
	if x.first && (s.cause == nil || time.Since(s.heard) >= tellingSilence) {
		// What stood behind the final dot was thrown away. It is cheap to be wrong about this, and dear to wait again.
		s.cfg.profile.overlapFailed()
	}
	return &conn.TimeoutError{Step: conn.Step(x.op), After: x.limit}
}

// tellingSilence is how long there must be no reply to what stood behind a final dot, once that has its own, to conclude
// anything from it where the one who waited has given up. A caller may do so at any moment, whatever the relay is like.
const tellingSilence = time.Second

// Ending.

// doom ends the use of the session because of err. It may be called from anywhere, any number of times; the first cause
// counts. Final replies that are outstanding are still awaited.
func (s *session) doom(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.doomLocked(err)
	s.armLocked()
}

func (s *session) doomLocked(err error) {
	if s.cause != nil {
		return
	}
	if err == nil {
		err = errors.New("session ended")
	}
	s.cause = err
	if s.retired == "" {
		s.retired = closeFault
	}
	close(s.doomed)
}

// stepLostLocked ends the session because of a reply that cannot be that to its command. No final reply is awaited any more: what
// comes would be taken for the reply to another message.
func (s *session) stepLostLocked(err error) {
	s.outOfStep = true
	s.doomLocked(err)
}

// kill ends the session now, awaiting nothing.
func (s *session) kill(err error) {
	s.mu.Lock()
	s.doomLocked(err)
	s.abort = true
	s.closeBy = longAgo
	s.armLocked()
	s.mu.Unlock()
	s.raw.abandon() // second, so that the end of reading and writing is known to be a consequence
}

// lastWords is how long the relay may take to say why it does not take what is written.
const lastWords = 2 * time.Second

// writeFailed notes that a write has failed. The relay's last reply tells more than "broken pipe", so there is a short time
// for it to be read.
func (s *session) writeFailed(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.writeErr == nil {
		s.writeErr = err
	}
	switch {
	case s.cause != nil: // the write was interrupted
	case isTimeout(err):
		s.doomLocked(err) // the relay stalls; it has not closed
	default:
		s.hurryLocked(lastWords)
	}
	s.armLocked()
}

// Writing. All of it is for the holder of the write side.

// Write hands p to the connection; it is what out writes to. Once the session is doomed nothing leaves any more: that is
// what makes a final dot that was not sent by then a message that was not accepted.
func (s *session) Write(p []byte) (int, error) {
	s.mu.Lock()
	if s.cause != nil {
		s.mu.Unlock()
		return 0, s.cause
	}
	s.attempted = s.written + int64(len(p))
	s.writing = true
	s.mu.Unlock()
	n, err := s.conn.Write(p)
	s.mu.Lock()
	before := s.written
	s.written += int64(n)
	s.attempted = s.written
	s.writing = false
	if s.head < len(s.waiting) && s.waiting[s.head].end > before {
		s.armLocked() // until now the limit was that of writing
	}
	s.wrote.Broadcast()
	s.mu.Unlock()
	if err != nil {
		s.writeFailed(err)
	}
	return n, err
}

// position is the number of octets written so far, those in the buffer included.
func (s *session) position() int64 { return s.written + int64(s.out.Buffered()) }

// expect appends an exchange for the command that is written next. It fails if the session is doomed.
func (s *session) expect(x exchange) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause != nil {
		return false
	}
	s.waiting = append(s.waiting, x)
	switch {
	case x.final:
		s.pending++
		s.unended = false
	case x.tx != nil:
		x.tx.asked++
	}
	if len(s.waiting)-s.head == 1 {
		s.armLocked()
	}
	return true
}

// flush hands what is in the buffer to the connection.
func (s *session) flush() error { return s.out.Flush() }

// sendAway flushes the buffer while its owner waits. It ends when all has left, and with it the session if the owner does not
// wait any more.
func (s *session) sendAway() {
	s.flush()
	if s.parted.CompareAndSwap(false, true) {
		s.sent <- struct{}{}
	} else {
		s.doom(errGivenUp)
	}
}

// quit says QUIT, if that was not said yet. The read loop sees the rest.
func (s *session) quit() {
	s.mu.Lock()
	said := s.quitting || s.cause != nil
	s.mu.Unlock()
	if said || !s.writeQuit(false) {
		return
	}
	s.flush()
}

// writeQuit puts QUIT into the buffer; behind tells whether it stands behind a final dot that has no reply yet.
func (s *session) writeQuit(behind bool) bool {
	const command = "QUIT\r\n"
	end := s.position() + int64(len(command))
	if !s.expect(exchange{op: OpQuit, limit: s.cfg.Timeouts.Quit, first: behind, end: end}) {
		return false
	}
	s.mu.Lock()
	s.quitting = true
	s.mu.Unlock()
	s.out.WriteString(command)
	s.traceCommand(context.Background(), "QUIT")
	return true
}

func (s *session) traceCommand(ctx context.Context, line string) {
	if t := s.cfg.Trace; t != nil && t.Command != nil {
		t.Command(ctx, s.id, line)
	}
}
