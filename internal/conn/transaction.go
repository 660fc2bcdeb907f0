package conn

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/smtprelay/smtprelay/internal/wire"
)

// transaction is one try to send a message, or its part for some of its recipients, on one connection:
//
//	[AUTH] [RSET] MAIL RCPT… DATA    in one write, if pipelined
//	body and final dot               if DATA was answered by 354
//	[QUIT]                           if it is the connection's last
//
// The write side goes back to its Owner as soon as the final dot is written; the transaction of another message may then
// begin while this one awaits its final reply (RFC 2920, 3.1).
type Transaction struct {
	ctx  context.Context
	c    *Conn
	m    Message
	mail wire.MailParams // as they are sent

	signal       chan struct{} // told that a reply is in; has room for one
	seq          int           // 1-based number of this transaction on its connection; 0: not begun
	overlapped   bool          // begun behind a final dot without reply
	clearing     bool          // RSET has to clear an envelope away
	holdsPrevDot bool          // begun with another one's final dot still in the buffer
	held         bool          // in chunks: the body waits for the replies to the envelope
	endAt        int64         // from this position on the relay may have the message; 0 while its end is not in the buffer
	byData       bool          // the body goes by DATA, and not in chunks
	chunked      chunkedBody
	bodyBegun    bool  // the body was asked to write itself
	sinkErr      error // why no more of the body is taken
	lostWriting  bool  // because the connection takes no more
	bodyErr      error // why the body was given up
	bodyOver     bool  // in chunks: all of the body is in them, and its end may follow
	endErr       error // why the end was kept back; see Message.BeforeEnd
	afterIdle    bool  // the connection was idle for so long that it may be dead
	ledByAuth    bool  // AUTH is its first command; set before that is expected
	handedOver   bool  // somebody else has the write side already
	shared       bool  // the guard's function may still run, and look at the transaction

	unguard func() bool // ends what guard has begun

	known bool         // the read loop, or the guard, may still look at the transaction; set by result
	taken []wire.Reply // to RCPT, of the result

	// Guarded by c.mu.
	asked, answered int // commands of the envelope, and replies to them
	replies         Replies
	notified        bool // it is in, and the Owner knows
	cancelled       bool // the end of ctx is why the connection was lost
	after421        bool // the final reply is 2xx, and 421 was said before it
	contradicted    bool // the final reply came together with another one that says the contrary
}

// NewTransaction prepares a transaction of m. The write side of c is the caller's. Its Run comes next, then its Recycle.
func NewTransaction(ctx context.Context, c *Conn, m Message) *Transaction {
	t, ok := c.o.transactions.Get().(*Transaction)
	if !ok {
		t = &Transaction{signal: make(chan struct{}, 1)}
	}
	*t = Transaction{ctx: ctx, c: c, m: m, mail: m.Mail, signal: t.signal, replies: Replies{Rcpt: t.replies.Rcpt[:0]}, taken: t.taken[:0], unguard: unguarded}
	for range m.Rcpts {
		t.replies.Rcpt = append(t.replies.Rcpt, wire.Reply{})
	}
	select {
	case <-t.signal:
	default:
	}
	return t
}

// result tells what became of t, which is over: nothing of it is written any more. It is called once.
func (t *Transaction) result() Result {
	c := t.c
	ctxErr := ContextError(t.ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	t.known = t.shared || t.asked != t.answered || t.endAt > 0 && !t.notified
	t.taken = append(t.taken[:0], t.replies.Rcpt...) // those that come yet are not in the result
	r := Result{
		Replies: t.replies,
		Begun:   t.asked > 0, Chunked: !t.byData, Overlapped: t.overlapped, BodyBegun: t.bodyBegun, BodyErr: t.bodyErr, EndErr: t.endErr, Body: t.m.Body, Size: t.m.Size,
		Seq: t.seq, Used: c.used, LedByAuth: t.ledByAuth, AfterIdle: t.afterIdle, CtxErr: ctxErr, Cancelled: t.cancelled, Lost: c.ending.cause, Left421: c.ending.left421,
		OutOfStep: c.ending.outOfStep, Contradicted: t.contradicted, After421: t.after421,
	}
	r.Rcpt = t.taken
	switch {
	case t.endAt == 0:
	case c.attempted >= t.endAt:
		r.End = EndSent
	case c.ending.cause == nil && c.writeErr == nil:
		r.End = EndDue
	default:
		r.End = EndUnsent
	}
	if t.answered < t.asked {
		for _, x := range c.waiting.all() {
			if x.tx == t {
				r.Waiting, r.WaitingRcpt = x.op, x.rcpt
				break
			}
		}
	}
	return r
}

// Recycle is called once nobody uses the Result.
func (t *Transaction) Recycle() {
	if t.known {
		return
	}
	o := t.c.o
	if t.chunked.buffer != nil {
		chunkPool.Put(t.chunked.buffer)
	}
	clear(t.replies.Rcpt) // the relay's words are not kept for the next one
	clear(t.taken)
	*t = Transaction{signal: t.signal, replies: Replies{Rcpt: t.replies.Rcpt[:0]}, taken: t.taken[:0]}
	o.transactions.Put(t)
}

// Run makes the transaction and tells what became of it. It gives the write side back in any case. The Result is valid
// until Recycle.
func (t *Transaction) Run() Result {
	if t.write() {
		t.awaitFinal()
	}
	return t.result()
}

// write makes the transaction up to its final dot, gives the write side back, and reports whether a final reply is due.
func (t *Transaction) write() (dotted bool) {
	c := t.c
	defer func() {
		if !t.handedOver {
			c.owner.Release()
		}
	}()
	t.holdsPrevDot = c.out.Buffered() > 0
	if t.ctx.Err() != nil {
		return false // nothing was written of this one; Release sees to the other's final dot
	}
	completed := false
	defer func() {
		if !completed { // Body.WriteTo or BeforeEnd has panicked, in the middle of a message
			c.fail(&GivenUpError{errors.New("the body, or BeforeEnd, panicked")})
		}
	}()
	dotted = t.converse()
	completed = true
	return dotted
}

func (t *Transaction) converse() (due bool) {
	defer func() { t.unguard() }()
	t.byData = t.goesByData()
	// Flush the previous message's final dot before producing our body, so that a slow body cannot delay it. Nothing blocks that
	// our context does not end.
	if !t.holdsPrevDot {
		t.guard()
	} else if !t.fitsBuffer() && !t.send() {
		return false
	}
	if !t.byData && OneShot(t.m.Body) {
		if t.bodyErr = t.readAhead(); t.bodyErr != nil {
			return false
		}
		t.byData = t.goesByData()
	}
	if !t.byData {
		return t.converseInChunks() && t.part()
	}
	if !t.beginData() {
		return false
	}
	t.c.body.Reset(t.c.out, true)
	if err := t.writeBody(); err != nil {
		t.giveUp(err)
		return false
	}
	return t.part()
}

// beginData makes the envelope and DATA, and reports whether the body is to follow.
func (t *Transaction) beginData() bool {
	for {
		if !t.envelope() || !t.askData() || !t.send() || !t.awaitEnvelope() {
			return false
		}
		if !t.overlapRefused() {
			return t.startData()
		}
		t.repeat()
	}
}

// part ends the message with its final dot, or last chunk, which is all that may be left in the buffer by now. If
// somebody waits, it leaves in one write with his envelope, out of reach of this one's context.
func (t *Transaction) part() (due bool) {
	if t.m.BeforeEnd != nil && !t.mayEnd() {
		return false
	}
	if room := t.remaining() + endRoom; t.c.owner.Wanted() && room <= outBuffer {
		if int64(t.c.out.Available()) < room {
			t.c.Flush() // our context still cancels this write; with another's final dot in the buffer all has been found to fit
		}
		if !t.unguard() || !t.end() {
			return false
		}
		if t.handedOver = t.c.owner.Handoff(); t.handedOver {
			return true
		}
		if t.holdsPrevDot {
			return true // Release flushes: with it go messages of others, who have nothing to do with this one's context
		}
		t.guard() // nobody goes on here
		t.c.Flush()
		t.unguard()
		return true
	}
	if !t.end() {
		return false
	}
	t.c.Flush()
	return true
}

// mayEnd has all leave that is written, and asks whether the end of the message may follow. What is still in the buffer may
// be the end of another message, which must not wait for the answer.
func (t *Transaction) mayEnd() bool {
	c := t.c
	if !t.byData {
		if t.bodyOver = t.lastChunks(); !t.bodyOver {
			return false
		}
	}
	if !t.send() || !t.byData && t.unwanted() {
		return false
	}
	to := make([]string, len(t.m.Rcpts))
	for i := range to {
		to[i], _ = t.m.recipient(i)
	}
	ctx, cancel := context.WithCancelCause(t.ctx)
	defer cancel(nil)
	if !c.onLoss(cancel) {
		return false
	}
	defer c.onLoss(nil)
	err := t.m.BeforeEnd(ctx, to)
	if err == nil {
		return true
	}
	if t.ctx.Err() == nil && ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return false // it is the connection that has ended
	}
	t.endErr = fmt.Errorf("BeforeEnd: %w", err)
	c.fail(&GivenUpError{t.endErr})
	return false
}

// endRoom is how much of the buffer the commands around the end of a message take at most: twice BDAT, and QUIT.
const endRoom = 64

// fitsBuffer reports whether all that is to be written before a reply is awaited fits into the write buffer, beside what is
// there.
func (t *Transaction) fitsBuffer() bool {
	room := int64(t.c.out.Available()) - t.envelopeRoom()
	switch {
	case t.byData:
		return room >= 0
	case !isBytes(t.m.Body):
		return false // it is made before its envelope is written
	case t.waitsForRcpts() || !t.c.inStep || !t.c.overlapped:
		return room >= 0 // it will be held
	}
	return room >= t.remaining()+endRoom
}

// envelopeRoom is how much of the buffer the envelope takes at most.
func (t *Transaction) envelopeRoom() int64 {
	const commands, coded = 256, 6 // octets; octets for each of a parameter's
	n := commands + len(t.m.From) + coded*len(t.mail.EnvelopeID)
	if t.mail.Auth != nil {
		n += coded * len(*t.mail.Auth)
	}
	for i := range t.replies.Rcpt {
		addr, p := t.m.recipient(i)
		n += len("RCPT TO:<>\r\n") + len(addr)
		if p.Notify != nil || p.Orcpt != "" || !p.Since.IsZero() {
			n += commands + coded*len(p.Orcpt)
		}
	}
	return int64(n)
}

// send flushes the buffer. The end of the context does not interrupt that while another one's final dot is in it, but ends
// the wait: then the connection ends too, once all has left. From then on the context ends the transaction.
func (t *Transaction) send() bool {
	carried := t.holdsPrevDot
	if carried && t.ctx.Done() != nil {
		if t.handedOver = !t.c.sendOff(t.ctx); t.handedOver {
			return false
		}
	}
	t.holdsPrevDot = false
	sent := t.sendNow() // which tells how it went
	if carried {
		t.guard()
	}
	return sent
}

// giveUp ends the connection because of a body that cannot be completed: nothing but closing without the final dot keeps a
// truncated message from being accepted.
func (t *Transaction) giveUp(err error) {
	if t.lostWriting {
		t.explained() // it is the connection that failed, not the body
		return
	}
	t.bodyErr = err
	t.c.fail(&GivenUpError{fmt.Errorf("body given up: %w", err)})
}

// sendNow flushes the buffer.
func (t *Transaction) sendNow() bool { return t.c.Flush() == nil || t.explained() }

// unguarded is what ends no guard.
func unguarded() bool { return true }

// guard makes the end of the context end the transaction, until t.unguard is called. If that returns false, it is too late.
// The connection lives on until the final replies due to others are in.
func (t *Transaction) guard() {
	if t.ctx.Done() == nil {
		return
	}
	c, ctx := t.c, t.ctx
	cancel := func() {
		c.mu.Lock()
		t.cancelled = t.cancelled || c.ending.cause == nil
		c.failLocked(errGivenUp) // the cause that other transactions see
		c.armLocked()
		c.mu.Unlock()
		c.raw.interrupt() // second, so that a write which it ends is known to be a consequence
	}
	stop := context.AfterFunc(ctx, cancel)
	first, result := true, false
	t.unguard = func() bool {
		if first {
			if first, result = false, stop(); !result {
				t.shared = true
				cancel() // its goroutine may not have come to it, and the connection must not go on
			}
		}
		return result
	}
}

// GivenUpError is why a connection ended that was at no fault: a message on it was given up in the middle.
type GivenUpError struct{ Err error }

func (e *GivenUpError) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *GivenUpError) Unwrap() error { return e.Err }

var errGivenUp = &GivenUpError{errors.New("the connection was given up with a message that was cancelled")}

// maxFailed is how many transactions in a row may come to nothing before their connection is replaced: relays count what was
// refused, and leave in the middle of something at 10 (Exim) or 20 (Postfix).
const maxFailed = 8

// explained waits for the connection to end after a write has failed, so that the relay's last words are known, or for the end
// of the context.
func (t *Transaction) explained() bool {
	select {
	case <-t.c.lost:
	case <-t.ctx.Done():
	}
	return false
}

// expect appends an exchange of the envelope.
func (t *Transaction) expect(x exchange) bool {
	x.tx = t
	return t.c.expect(x)
}

// writeBody has the body written through c.body, without the final dot.
func (t *Transaction) writeBody() error {
	c := t.c
	t.bodyBegun = true
	n, err := t.bodyTo(t.m.Body)
	if t.sinkErr != nil {
		err = t.sinkErr // whatever the body made of it
	}
	if err == nil && n > c.body.Taken() {
		err = io.ErrShortWrite
	}
	if err == nil && c.body.Taken() == 0 {
		err = ErrEmptyBody
	}
	if err == nil {
		if err = c.body.Close(); err != nil {
			t.lostWriting = true
		}
	}
	return err
}

// bodyTo has body write itself to t.
func (t *Transaction) bodyTo(body io.WriterTo) (int64, error) {
	if isBytes(body) {
		return body.WriteTo(t)
	}
	w := &bodySink{t: t}
	n, err := body.WriteTo(w)
	w.end()
	return n, err
}

// bodySink is what a Body writes to while it is asked to. A Body may keep it and write from a goroutine that it has left
// behind, when the transaction is that of another message already.
type bodySink struct {
	mu sync.Mutex   // held while t is written to
	t  *Transaction // nil once WriteTo has returned
}

var errBodyOver = errors.New("the body was written after its WriteTo had returned")

// Write implements io.Writer.
func (w *bodySink) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.t == nil {
		return 0, errBodyOver
	}
	return w.t.Write(p)
}

func (w *bodySink) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.t = nil
}

// Write takes a part of the body. After an error it takes no more.
func (t *Transaction) Write(p []byte) (n int, err error) {
	c := t.c
	switch {
	case t.sinkErr != nil:
		return 0, t.sinkErr
	case t.ctx.Err() != nil:
		t.sinkErr = ContextError(t.ctx)
		return 0, t.sinkErr
	}
	n, err = c.body.Write(p)
	if err != nil {
		t.lostWriting = true
	} else if c.ext.Size > 0 && c.body.Size() > c.ext.Size {
		err = &SizeError{Limit: c.ext.Size}
	}
	t.sinkErr = err
	return n, err
}

// end puts the final dot, or what was held back of the last chunk, into the buffer, and QUIT behind it if the connection takes
// no further transaction.
func (t *Transaction) end() bool {
	c := t.c
	if t.byData {
		if !t.finish(StepFinalDot, ".") {
			return false
		}
	} else if !t.bodyOver && !t.lastChunks() || !t.finishChunks() {
		return false
	}
	c.mu.Lock()
	quit := c.phase != ready
	c.mu.Unlock()
	if quit && c.overlaps() {
		c.writeQuit(true)
	}
	return true
}

// finish writes the command that ends the message.
func (t *Transaction) finish(op Step, command string) bool {
	c := t.c
	// Some relays take a line that the end of the connection has cut for a whole one: the message may be theirs as soon as the
	// command has left without its line end. This is set ahead of time, since a full buffer leaves while more is put into it.
	t.endAt = c.position() + int64(len(command))
	if !c.expect(exchange{op: op, final: true, end: t.endAt + int64(len("\r\n")), tx: t, limit: c.o.Timeouts.FinalReply}) {
		t.endAt = 0
		return false
	}
	c.traceCommand(t.ctx, command)
	c.out.WriteString(command)
	c.out.WriteString("\r\n")
	return true
}

// awaitFinal waits for the final reply or the end of the connection; from the end of the context on for Timeouts.Drain at most.
func (t *Transaction) awaitFinal() {
	ended := t.ctx.Done()
	var drained <-chan time.Time
	for {
		t.c.mu.Lock()
		in := t.notified
		t.c.mu.Unlock()
		if in {
			return
		}
		select {
		case <-t.signal:
		case <-t.c.done:
			return
		case <-ended:
			ended = nil
			if drain := t.c.o.Timeouts.Drain; drain > 0 {
				timer := time.NewTimer(drain)
				defer timer.Stop()
				drained = timer.C
			}
		case <-drained:
			return
		}
	}
}
