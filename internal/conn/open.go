package conn

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"time"

	"github.com/smtprelay/smtprelay/internal/scrub"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// OpenError says why a connection could not be opened.
type OpenError struct {
	Step       Step
	Reply      wire.Reply // Code 0: no reply
	Err        error      // the cause, if it is not a reply
	Permanent  bool       // a retry cannot help
	Clear      bool       // TLS is required and had not begun
	TLSOffered bool       // the relay offers STARTTLS
	Said       string     // the command sent, if Step is EHLO
}

func (e *OpenError) Error() string {
	if e.Err != nil {
		return string(e.Step) + ": " + e.Err.Error()
	}
	return string(e.Step) + ": " + e.Reply.String()
}

// Unwrap returns the cause.
func (e *OpenError) Unwrap() error { return e.Err }

// ErrNoSTARTTLS is the cause if the relay does not offer STARTTLS. ErrClearAuth is the cause if credentials would cross the
// connection in the clear.
var (
	ErrNoSTARTTLS = errors.New("the relay does not offer STARTTLS")
	ErrClearAuth  = errors.New("credentials would cross the connection in the clear")
)

// Open prepares nc for the first transaction: TLS if implicit, greeting, EHLO, STARTTLS followed by a second EHLO, and AUTH. AUTH
// may be left for the first transaction to send. Open fails when ctx ends. After Open the caller calls Bound and starts ReadLoop.
//
// hurry shortens the limits of the steps before AUTH to a third, because the caller has other addresses to try.
//
// After an error the caller calls leave, which returns when the relay has closed the connection.
func Open(ctx context.Context, nc net.Conn, o *Options, owner Owner, trace Trace, hurry bool) (_ *Conn, leave func(), _ *OpenError) {
	raw := newProgressConn(nc, o.Timeouts.Write, o.Timeouts.Unacked)
	stop := context.AfterFunc(ctx, raw.abandon)
	c := &Conn{o: o, owner: owner, trace: trace, raw: raw, conn: raw, born: time.Now(), sent: make(chan struct{}, 1), lost: make(chan struct{}), done: make(chan struct{}), said: o.Said.NewStream()}
	c.wrote.L = &c.mu
	d := &dialogue{c: c, o: o, ctx: ctx, hurry: hurry}
	d.clearMail, d.clearAuth = o.Clear(nc)
	e := d.converse(ctx)
	if e == nil && !stop() {
		e = &OpenError{Step: StepDial, Err: ContextError(ctx)}
	}
	if e != nil {
		defer stop()
		e.Clear, e.TLSOffered = c.tls == nil && d.wantsTLS(), c.ext.Has("STARTTLS")
		if e.Err != nil && ctx.Err() != nil {
			e.Err = ContextError(ctx)
		}
		return nil, func() {
			defer context.AfterFunc(ctx, raw.abandon)()
			d.leave(e)
			raw.hangUp(o.Timeouts.Quit) // even a relay that does not answer counts the connection
		}, e
	}
	raw.SetReadDeadline(time.Time{})
	c.out = bufio.NewWriterSize(c, outBuffer)
	return c, nil, nil
}

// outBuffer is the size of a connection's write buffer. It equals the size of a TLS record, so that most messages fit one record.
const outBuffer = 16 << 10

// dialogue is the exchange of commands and replies that opens a connection, one command at a time.
type dialogue struct {
	c      *Conn
	o      *Options
	ctx    context.Context
	hurry  bool      // the caller has other addresses to try
	raw    string    // unscrubbed text of the last reply, for the SASL mechanism and to parse EHLO; never shown
	authBy time.Time // deadline for AUTH; zero means that AUTH has not begun or has no limit

	clearMail, clearAuth bool // mail or credentials may be sent without TLS
}

// wantsTLS reports whether the connection is useless without TLS.
func (d *dialogue) wantsTLS() bool {
	return d.o.TLS != nil && (d.o.Implicit || !d.clearMail || d.o.Mechanism != nil && !d.clearAuth)
}

// converse runs the steps of Open.
func (d *dialogue) converse(ctx context.Context) *OpenError {
	c, o := d.c, d.o
	if o.TLS != nil && o.Implicit {
		if e := d.startTLS(ctx); e != nil {
			return e
		}
	}
	c.replies = wire.NewReplyReader(c.conn)
	if e := d.greeting(); e != nil {
		return e
	}
	if e := d.hello(); e != nil {
		return e
	}
	if c.tls == nil && o.TLS != nil {
		if e := d.upgrade(ctx); e != nil {
			return e
		}
	}
	shown, known := false, true
	if o.Chunking && c.ext.Has("CHUNKING") && c.pipelining() {
		// Without an address, the profile could confuse one relay with another.
		if c.addr = remoteAddr(c.raw); c.addr != "" {
			shown, known = o.Profile.DiscardsAt(c.addr)
		}
	}
	if e := d.authenticate(ctx, known); e != nil {
		return e
	}
	if !known {
		var e *OpenError
		if shown, e = d.showDiscard(); !shown && ctx.Err() == nil {
			o.Profile.NoteDiscard(c.addr, false)
		}
		if e != nil {
			return e
		}
	}
	c.chunked, c.inStep = shown, known
	return nil
}

// remoteAddr returns the IP and port of nc's remote end; "" if nc does not know it.
func remoteAddr(nc net.Conn) string {
	if a := nc.RemoteAddr(); a != nil {
		return a.String()
	}
	return ""
}

// startTLS performs the TLS handshake.
func (d *dialogue) startTLS(ctx context.Context) *OpenError {
	// Read deadlines bound the handshake and end it with ctx. HandshakeContext would close the connection, but its place in the
	// pool is not free before the relay has closed it too.
	d.progress(StepTLS)
	raw := d.c.raw
	limit, deadline := d.patience(d.o.Timeouts.TLS), time.Time{}
	if limit > 0 {
		deadline = time.Now().Add(limit)
	}
	raw.SetReadDeadline(deadline) // without a limit too: that of the reply to STARTTLS is over
	tc := tls.Client(raw, d.o.TLS)
	err := tc.HandshakeContext(context.WithoutCancel(ctx))
	switch {
	case err == nil:
		state := tc.ConnectionState()
		d.c.conn, d.c.tls = tc, &state
		d.c.replies = wire.NewReplyReader(tc)
		return nil
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case isOver(err):
		err = &TimeoutError{Step: StepTLS, After: limit}
	}
	return &OpenError{Step: StepTLS, Err: err}
}

// patience returns the time limit of a step before AUTH; limit is the value without hurry. 0 means no limit.
func (d *dialogue) patience(limit time.Duration) time.Duration {
	const share, most = 3, 10 * time.Second
	switch {
	case !d.hurry:
		return limit
	case limit == 0:
		return most
	}
	return limit / share
}

func (d *dialogue) greeting() *OpenError {
	r, e := d.read(StepGreeting, d.patience(d.o.Timeouts.Greeting))
	if e == nil && r.Class() != 2 {
		e = refusedBy(StepGreeting, r)
	}
	if e == nil {
		d.c.owner.Greeted()
	}
	return e
}

// hello sends EHLO. If the relay does not understand EHLO, and neither TLS nor AUTH is needed, hello sends HELO.
func (d *dialogue) hello() *OpenError {
	c, o := d.c, d.o
	name := o.LocalName(c.raw)
	line := "EHLO " + name
	c.hello = line
	r, e := d.command(StepEHLO, line, line, d.patience(o.openingLimit()))
	if e != nil {
		return e
	}
	c.ext = wire.Extensions{}
	switch {
	case r.Class() == 2:
		return d.extensions()
	case (r.Code == 500 || r.Code == 502) && d.clearMail && o.Mechanism == nil:
		line = "HELO " + name
		if r, e = d.command(StepEHLO, line, line, d.patience(o.openingLimit())); e != nil {
			return e
		}
		if r.Class() == 2 {
			return nil
		}
	}
	e = refusedBy(StepEHLO, r)
	e.Said = line
	return e
}

// maxEHLOLines limits the lines read from a relay that sends each line of its reply to EHLO as a separate reply.
const maxEHLOLines = wire.MaxWords

// restOfEHLO is how long to wait for the next line of such a relay, while the lines so far offer less than is needed.
const restOfEHLO = time.Second

// extensions parses the relay's reply to EHLO, of which the first positive reply has been read. No other command is outstanding, so
// further positive replies can only be lines that the relay has failed to mark as continuation lines.
func (d *dialogue) extensions() *OpenError {
	c := d.c
	text, lines := d.raw, 1
	c.ext = wire.ParseEHLO(text)
	for ; lines < maxEHLOLines && len(text) < wire.MaxLongText; lines++ {
		if c.replies.Buffered() == 0 && !strings.Contains(d.raw, "\n") && !d.offersEnough() {
			c.raw.SetReadDeadline(time.Now().Add(restOfEHLO))
			c.replies.Await()
		}
		if c.replies.Peek()/100 != 2 {
			break
		}
		r, e := d.read(StepEHLO, d.patience(d.o.openingLimit()))
		if e == nil && r.Class() != 2 {
			e = refusedBy(StepEHLO, r)
		}
		if e != nil {
			return e
		}
		text += "\n" + d.raw
		c.ext = wire.ParseEHLO(text)
	}
	return nil
}

// offersEnough reports whether the connection can be opened with what the relay offers.
func (d *dialogue) offersEnough() bool {
	c, o := d.c, d.o
	if c.tls == nil && o.TLS != nil && !d.clearMail {
		return c.ext.Has("STARTTLS")
	}
	return o.Mechanism == nil || c.ext.Has("AUTH")
}

// upgrade starts TLS with STARTTLS (RFC 3207). If the relay does not offer STARTTLS and mail may be sent in the clear, it does
// nothing.
func (d *dialogue) upgrade(ctx context.Context) *OpenError {
	c := d.c
	if !c.ext.Has("STARTTLS") {
		if d.clearMail {
			return nil
		}
		return &OpenError{Step: StepSTARTTLS, Permanent: true, Err: ErrNoSTARTTLS}
	}
	r, e := d.command(StepSTARTTLS, "STARTTLS", "STARTTLS", d.patience(d.o.openingLimit()))
	if e != nil {
		return e
	}
	if r.Class() != 2 {
		return refusedBy(StepSTARTTLS, r)
	}
	if c.replies.Buffered() > 0 {
		// An attacker may have injected plaintext to be read as if it came through TLS (CVE-2011-0411).
		return &OpenError{Step: StepSTARTTLS, Err: errors.New("unexpected bytes in the clear after the reply")}
	}
	if e := d.startTLS(ctx); e != nil {
		return e
	}
	return d.hello()
}

// refusedBy returns the error for a reply that is not the expected one.
func refusedBy(step Step, r wire.Reply) *OpenError { return &OpenError{Step: step, Reply: r} }

// command writes a command and reads its reply; the trace gets show in place of line.
func (d *dialogue) command(op Step, show, line string, limit time.Duration) (wire.Reply, *OpenError) {
	d.c.traceCommand(d.ctx, show)
	if _, err := d.c.conn.Write([]byte(line + "\r\n")); err != nil {
		// The relay may have said why it closed the connection.
		if r, e := d.read(op, lastWords); e == nil {
			return wire.Reply{}, refusedBy(op, r)
		}
		return wire.Reply{}, &OpenError{Step: op, Err: Explain(err)}
	}
	return d.read(op, limit)
}

// read reads one reply. A 421 is always an error.
func (d *dialogue) read(op Step, limit time.Duration) (wire.Reply, *OpenError) {
	c := d.c
	d.progress(op)
	deadline := time.Time{}
	if limit > 0 {
		deadline = time.Now().Add(limit)
	}
	if op == StepAuth && !d.authBy.IsZero() {
		deadline = d.authBy
	}
	c.raw.SetReadDeadline(deadline)
	r, raw, err := c.readReply(op == StepEHLO || op == StepAuth)
	d.raw = raw
	switch {
	case err != nil && isOver(err):
		err = &TimeoutError{Step: op, After: limit}
		fallthrough
	case err != nil:
		return r, &OpenError{Step: op, Err: Explain(err)}
	}
	if c.trace.Reply != nil {
		shown := r
		if op == StepAuth && r.Code == 334 {
			shown.Text = scrub.Redacted
		}
		c.trace.Reply(d.ctx, op, shown)
	}
	if r.Code == 421 {
		return r, refusedBy(op, r)
	}
	return r, nil
}

func (d *dialogue) progress(step Step) {
	if d.o.Progress != nil {
		d.o.Progress(step)
	}
}

// leave sends QUIT if the relay still reads commands after e. The reply is not read.
func (d *dialogue) leave(e *OpenError) {
	if e.Reply.Code != 0 && e.Reply.Code != 421 || e.Permanent && e.Step != StepTLS {
		d.c.conn.Write([]byte("QUIT\r\n"))
		d.c.endTLS()
	}
}

// showDiscard probes whether the relay discards the octets of a chunk that it refuses. It sends a chunk out of order, which the
// relay must refuse, and RSET. A relay that discards the octets sends two replies. A relay that does not discard them reads the
// octets as an unknown command and sends three replies. An error means that the probe broke the connection.
func (d *dialogue) showDiscard() (yes bool, _ *OpenError) {
	const chunk = "XCHUNK\r\n"
	limit := d.o.Timeouts.Overlap
	r, e := d.command(StepBdat, "BDAT 8 (out of order, to see how the relay refuses it), RSET", "BDAT 8\r\n"+chunk+"RSET", limit)
	if e != nil {
		return false, e
	}
	refused := r.Class() >= 4
	if r, e = d.read(StepBdat, limit); e != nil {
		return false, e
	}
	yes = refused && r.Class() == 2
	if r.Class() >= 4 { // the relay has read the chunk
		if r, e = d.read(StepRset, limit); e != nil {
			return false, e
		}
	}
	if r.Class() != 2 {
		e = refusedBy(StepBdat, r)
	}
	return yes, e
}
