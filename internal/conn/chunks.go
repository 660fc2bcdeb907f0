package conn

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"

	"github.com/smtprelay/smtprelay/internal/body"
	"github.com/smtprelay/smtprelay/internal/moving"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// A body in chunks (RFC 3030) travels ahead of the relay's replies. These rules keep the outcome exact all the same:
//
//   - LAST stands on an empty chunk behind the body, in the same write. However a connection ends, what has arrived of a body
//     is no message: some relays take a last chunk that the end of the connection has cut short for the whole one.
//   - Bodies go in chunks only to an address that throws away the octets of a chunk that it refuses. Others read them as
//     commands, so that whoever writes a body could send mail in it. Each address is asked once: see showDiscard.
//   - The first chunk for an address waits for the replies to its envelope: a relay that sends a reply too many would be
//     believed to have accepted what it has not answered yet.
//   - The first chunk of a connection that would leave behind a message without final reply waits for the replies to its
//     envelope: some relays throw away what arrives together with the end of a message, and never answer it.
//   - A connection takes no further message once a body was left incomplete of which the relay has accepted a chunk: go-smtp
//     may give the next message the verdict on that one, and refuse what it has delivered.
//
// The first and the second are proofs. The others are not: a relay may do at any time what it has not done before.

// maxChunk is the size of the largest chunk, and of the buffer for a body whose size is not known.
const maxChunk = 64 << 10

var chunkPool = sync.Pool{New: func() any { return new([maxChunk]byte) }}

// errRefused ends the writing of a body that the relay does not want.
var errRefused = errors.New("refused by the relay")

// chunkedBody is a transaction's body on its way in chunks.
//
// MAIL declares the size of the message, so the size comes first: that of [body.Bytes] is known, and another body is made in a
// buffer before anything is written. One that outgrows the buffer goes in several chunks, of which only whole ones are
// written, so that the connection stays in step if it fails. If the relay has not said how large a message may be, such a body
// goes by DATA: a relay that stops reading within a chunk which is over a limit of its own would take the rest of it for
// commands (seen in Exim).
type chunkedBody struct {
	buffer *[maxChunk]byte // nil for Bytes
	used   int             // octets in it
	begun  bool            // the envelope is written
	dots   wire.BodyWriter // by DATA after all
	left   int64           // of Bytes: octets still to be written
	room   int             // of the chunk that is being written
}

// mustHoldLocked reports whether the body must not leave before the relay has answered its envelope.
func (t *Transaction) mustHoldLocked() bool {
	c := t.c
	switch {
	case c.pendingAuth != nil: // a relay that refuses AUTH may take mail all the same, as from anybody
	case t.clearing: // if RSET is refused, the message would go to the recipients of the envelope that is still open
	case t.waitsForRcpts():
	case !c.inStep:
	case t.result.Overlapped && !c.overlapped:
	default:
		return false
	}
	return true
}

// waitsForRcpts reports whether the body is held back until each recipient has its reply.
func (t *Transaction) waitsForRcpts() bool { return t.m.AllOrNothing && len(t.result.Rcpt) > 1 }

// goesInChunks reports whether the body goes in chunks, as far as that can be known before it is asked to write itself.
func (t *Transaction) goesInChunks() bool {
	switch b := t.m.Body.(type) {
	case body.Bytes:
		return t.c.chunked && !beginsOddly(b)
	case *headedBody:
		return t.c.chunked && !beginsOddly(b.head)
	}
	return t.c.chunked
}

// beginsOddly reports whether a body begins with a line that is no header field: Postfix takes an envelope line of a mailbox
// out of what comes by DATA, and keeps the header behind it; in chunks it takes all of it for the body of the message.
func beginsOddly(body []byte) bool {
	return bytes.HasPrefix(body, []byte("From ")) || bytes.HasPrefix(body, []byte(">From ")) ||
		len(body) > 0 && (body[0] == ' ' || body[0] == '\t')
}

// remaining is how much part has to write, but for the commands.
func (t *Transaction) remaining() int64 {
	switch {
	case !t.result.Chunked, t.bodyOver:
		return 0
	case isBytes(t.m.Body):
		return t.m.Size
	}
	return int64(t.chunks.used)
}

// converseInChunks writes the envelope, and of the body what part leaves over. It reports whether that is due.
func (t *Transaction) converseInChunks() bool {
	if isBytes(t.m.Body) {
		return t.beginChunks(t.m.Size)
	}
	b := &t.chunks
	b.buffer = chunkPool.Get().(*[maxChunk]byte)
	t.c.body.Reset((*chunkSink)(t), false)
	err := t.writeBody()
	if err == nil && !b.begun && beginsOddly(b.buffer[:b.used]) {
		err = t.goByData()
	}
	switch {
	case err == errRefused:
		return false
	case err != nil && !t.result.Chunked:
		t.giveUp(err)
		return false
	case err != nil:
		t.result.BodyErr = err // only whole chunks were written: the connection is in step
		if b.begun {
			t.c.Retire(Full)
		}
		return false
	case b.begun:
		return true
	}
	return t.beginChunks(int64(b.used))
}

// readAhead replaces a body that can be written once only: a small one by its octets, another one by a [headedBody].
func (t *Transaction) readAhead() error {
	r := t.m.Body.(io.Reader)
	var head bytes.Buffer
	switch n, err := io.CopyN(&head, readerUntil{t.ctx, moving.Reader(r)}, headAhead); {
	case err == nil:
		t.m.Body = &headedBody{head: head.Bytes(), rest: r}
		return nil
	case err != io.EOF:
		return err
	case n == 0:
		return ErrEmptyBody
	}
	t.m.Body, t.m.Size = body.Bytes(head.Bytes()), wire.CanonicalSize(head.Bytes())
	if limit := t.c.ext.Size; limit > 0 && t.m.Size > limit {
		return &SizeError{Limit: limit}
	}
	t.declare(t.m.Size)
	return nil
}

// declare has MAIL say how large the message is, where the relay takes that.
func (t *Transaction) declare(size int64) {
	if t.c.ext.Has("SIZE") {
		t.mail.Size = size
	}
}

// beginChunks writes the envelope for a message of size octets, 0 if that is not known, and reports whether the body is to
// follow.
func (t *Transaction) beginChunks(size int64) bool {
	if size > 0 {
		t.declare(size)
	}
	t.chunks.begun = true
	if !t.envelope() {
		return false
	}
	if !t.held {
		return true
	}
	together := t.result.Overlapped && t.holdsPrevDot // with the end of the message before, in one write
	if !t.send() || !t.awaitEnvelope() || !t.dataIsDue() {
		return false
	}
	c := t.c
	if !c.inStep {
		c.inStep = true
		c.o.Profile.NoteDiscard(c.addr, true)
	}
	if together {
		c.mu.Lock()
		c.overlapped = true
		c.mu.Unlock()
	}
	return true
}

// chunkSink takes the canonical form of a body whose size is not known.
type chunkSink Transaction

// Write implements io.Writer.
func (cs *chunkSink) Write(p []byte) (int, error) {
	t := (*Transaction)(cs)
	b := &t.chunks
	n := 0
	for {
		if !t.result.Chunked {
			k, err := b.dots.Write(p[n:])
			return n + k, err
		}
		k := copy(b.buffer[b.used:], p[n:])
		b.used += k
		if n += k; n == len(p) {
			return n, nil
		}
		if err := t.overflow(); err != nil {
			return n, err
		}
	}
}

// overflow makes room in the buffer: it writes a chunk, or goes over to DATA.
func (t *Transaction) overflow() error {
	b := &t.chunks
	if !b.begun && (t.c.ext.Size == 0 || beginsOddly(b.buffer[:b.used])) {
		return t.goByData()
	}
	if !b.begun && !t.beginChunks(0) || !t.writeChunk() || !t.sendNow() {
		return errRefused
	}
	if h, ok := t.m.Body.(*headedBody); ok && !h.used && (!t.awaitEnvelope() || t.unwanted()) {
		return errRefused // and it can be written again
	}
	return nil
}

// goByData begins an ordinary transaction in the middle of the body, and writes what is in the buffer.
func (t *Transaction) goByData() error {
	b := &t.chunks
	b.begun, t.result.Chunked = true, false
	if !t.beginData() {
		return errRefused
	}
	b.dots.Reset(t.c.out, true)
	_, err := b.dots.Write(b.buffer[:b.used])
	return err
}

// unwanted reports whether the relay has refused the message already, so that no further chunk is to be sent
// (RFC 3030, 2).
func (t *Transaction) unwanted() bool {
	t.c.mu.Lock()
	defer t.c.mu.Unlock()
	step, _ := t.result.Refusal(t.m.AllOrNothing)
	return step != ""
}

// startChunk writes the command for a chunk of n octets, unless the relay does not want it.
func (t *Transaction) startChunk(n int) bool {
	if t.unwanted() {
		return false
	}
	c := t.c
	c.line = append(strconv.AppendInt(append(c.line[:0], "BDAT "...), int64(n), 10), "\r\n"...)
	end := c.position() + int64(len(c.line)+n)
	if !c.expect(exchange{op: StepBdat, tx: t, limit: c.o.Timeouts.Command, end: end}) {
		return false
	}
	if c.trace.Command != nil {
		c.trace.Command(t.ctx, fmt.Sprintf("BDAT %d", n))
	}
	_, err := c.out.Write(c.line)
	return err == nil || t.explained()
}

// writeChunk writes what is in the buffer as a chunk.
func (t *Transaction) writeChunk() bool {
	b := &t.chunks
	if b.used == 0 {
		return true
	}
	if !t.startChunk(b.used) {
		return false
	}
	_, err := t.c.out.Write(b.buffer[:b.used])
	b.used = 0
	return err == nil || t.explained()
}

// lastChunks writes what is left of the body.
func (t *Transaction) lastChunks() bool {
	if t.chunks.buffer != nil {
		return t.writeChunk()
	}
	t.chunks.left = t.m.Size
	t.c.body.Reset((*chunkSplitter)(t), false)
	switch err := t.writeBody(); {
	case err == errRefused:
		return false
	case err != nil:
		t.giveUp(err)
		return false
	}
	return true
}

// finishChunks writes the empty chunk that ends the body.
func (t *Transaction) finishChunks() bool {
	return !t.unwanted() && t.finish(StepBdat, "BDAT 0 LAST")
}

// chunkSplitter divides the canonical form of a body whose size is known into chunks.
type chunkSplitter Transaction

// Write implements io.Writer.
func (cs *chunkSplitter) Write(p []byte) (int, error) {
	t := (*Transaction)(cs)
	b := &t.chunks
	n := 0
	for n < len(p) {
		if b.room == 0 {
			b.room = int(min(b.left, maxChunk))
			b.left -= int64(b.room)
			if !t.startChunk(b.room) {
				return n, errRefused
			}
		}
		k, err := t.c.out.Write(p[n:min(n+b.room, len(p))])
		n += k
		b.room -= k
		if err != nil {
			return n, err
		}
	}
	return n, nil
}
