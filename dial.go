package smtprelay

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"time"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// dial opens a connection and takes it to the point where a transaction can begin: TCP, TLS or greeting, EHLO, STARTTLS,
// TLS, EHLO again, and AUTH if that cannot lead the first transaction. The end of ctx ends it.
//
// Who gets an error calls leave, which returns when the relay has closed the connection.
func (c *settings) dial(ctx context.Context, id int64) (s *session, leave func(), e *Error) {
	began := time.Now()
	if t := c.Trace; t != nil && t.DialStart != nil {
		t.DialStart(ctx, c.Addr)
	}
	c.stats.dials.Add(1)
	s, leave, e = c.connect(ctx, id)
	if e != nil && e.Op == OpBdat && ctx.Err() == nil { // the question about refused chunks, which is not asked again
		leave()
		s, leave, e = c.connect(ctx, id)
	}
	info := DialInfo{Conn: id, Addr: c.Addr, Took: time.Since(began)}
	if e != nil {
		c.stats.dialErrors.Add(1)
		info.Err = e
	} else {
		for _, keyword := range s.ext.Keywords {
			info.Extensions = append(info.Extensions, c.said.Scrub(keyword))
		}
		if s.tls != nil {
			info.TLSVersion, info.Resumed = s.tls.Version, s.tls.DidResume
		}
	}
	if t := c.Trace; t != nil && t.DialDone != nil {
		t.DialDone(ctx, info)
	}
	return s, leave, e
}

func (c *settings) connect(ctx context.Context, id int64) (_ *session, leave func(), _ *Error) {
	nc, err := c.dialTCP(ctx)
	if err != nil {
		return nil, func() {}, &Error{Op: OpDial, subject: c.Addr, Outcome: NotAccepted, Err: err}
	}
	raw := &progressConn{Conn: nc, limit: c.Timeouts.Write}
	stop := context.AfterFunc(ctx, raw.abandon)
	s := &session{id: id, cfg: c, raw: raw, conn: raw, born: time.Now(), sent: make(chan struct{}, 1), doomed: make(chan struct{}), done: make(chan struct{}), said: c.said.NewStream()}
	s.wrote.L = &s.mu
	d := &dialogue{s: s, ctx: ctx}
	e := d.open(ctx)
	if e == nil && !stop() {
		e = &Error{Op: OpDial, subject: c.Addr, Outcome: NotAccepted, Err: conn.ContextError(ctx)}
	}
	if e != nil {
		defer stop()
		if e.Err != nil && ctx.Err() != nil {
			e.Err = conn.ContextError(ctx)
		}
		return nil, func() {
			defer context.AfterFunc(ctx, raw.abandon)()
			d.leave(e)
			raw.hangUp(c.Timeouts.Quit) // a relay that does not answer counts the connection all the same
		}, e
	}
	raw.SetReadDeadline(time.Time{})
	s.prepare()
	return s, nil, nil
}

// remoteAddr is the address that nc leads to, IP and port; "" if it does not tell.
func remoteAddr(nc net.Conn) string {
	if a := nc.RemoteAddr(); a != nil {
		return a.String()
	}
	return ""
}

func (c *settings) dialTCP(ctx context.Context) (net.Conn, error) {
	c.opening.Store(OpDial)
	if c.Timeouts.Dial > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.Timeouts.Dial)
		defer cancel()
	}
	dial := c.Dial
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	nc, err := dial(ctx, "tcp", c.Addr)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w; check host and port in Addr", err)
	case nc == nil:
		return nil, errors.New("Config.Dial has returned neither a connection nor an error")
	}
	// All that bounds a wait is a deadline, and all that ends one.
	if err := cmp.Or(nc.SetReadDeadline(time.Time{}), nc.SetWriteDeadline(time.Time{})); err != nil {
		nc.Close()
		return nil, fmt.Errorf("the connection takes no deadlines: %w", err)
	}
	return nc, nil
}

// prepare fills in what the relay's offer decides, once the dialogue has come to its end.
func (s *session) prepare() {
	c := s.cfg
	s.out = bufio.NewWriterSize(s, outBuffer)
	s.limit = c.Limits.MaxMessagesPerConn
	for _, limit := range []int{s.ext.Limits.MailMax, c.profile.maxMessages()} {
		if limit > 0 && (s.limit == 0 || limit < s.limit) {
			s.limit = limit
		}
	}
	if age := c.Limits.MaxConnAge; age > 0 {
		s.expires = s.born.Add(age - rand.N(age/10+1))
	}
}

// outBuffer is the size of a session's write buffer: a TLS record, so that a message of usual size leaves in one.
const outBuffer = 16 << 10

// dialogue is the conversation that makes a connection ready, one command at a time.
type dialogue struct {
	s      *session
	ctx    context.Context
	raw    string    // the text of the last reply as it came: for a mechanism and for what EHLO offers, and to show to nobody
	authBy time.Time // when AUTH must be through; zero means that it has not begun, or has no limit
}

// open takes the connection to where a transaction can begin.
func (d *dialogue) open(ctx context.Context) *Error {
	e := d.converse(ctx)
	if c := d.s.cfg; e != nil && d.s.tls == nil && (c.implicit() || !c.clearAllowed()) {
		// Whoever said it, or would not speak TLS, may be somebody on the way.
		e.unproven = true
	}
	return e
}

// converse takes the connection from its first byte to where a transaction, or the AUTH that leads it, can begin.
func (d *dialogue) converse(ctx context.Context) *Error {
	s, c := d.s, d.s.cfg
	if c.implicit() {
		if e := d.startTLS(ctx); e != nil {
			return e
		}
	}
	s.replies = wire.NewReplyReader(s.conn)
	if e := d.greeting(); e != nil {
		return e
	}
	if e := d.hello(); e != nil {
		return e
	}
	if s.tls == nil && c.TLS != TLSNone {
		if e := d.upgrade(ctx); e != nil {
			return e
		}
	}
	shown, known := false, true
	if c.Chunking && s.ext.Has("CHUNKING") && s.pipelining() {
		// Without an address, what is known of one relay could be believed of another.
		if s.addr = remoteAddr(s.raw); s.addr != "" {
			shown, known = c.profile.discardsAt(s.addr)
		}
	}
	if e := d.startAuth(ctx, s, known); e != nil {
		return e
	}
	if !known {
		var e *Error
		if shown, e = d.showDiscard(); !shown && ctx.Err() == nil {
			c.profile.noteDiscard(s.addr, false)
		}
		if e != nil {
			return e
		}
	}
	s.chunked, s.inStep = shown, known
	return nil
}

func (d *dialogue) startTLS(ctx context.Context) *Error {
	nc, e := d.s.cfg.handshake(ctx, d.s.raw)
	if e != nil {
		return e
	}
	state := nc.ConnectionState()
	d.s.conn, d.s.tls = nc, &state
	d.s.replies = wire.NewReplyReader(nc)
	return nil
}

func (d *dialogue) greeting() *Error {
	r, e := d.read(OpGreeting, d.s.cfg.Timeouts.Greeting)
	switch {
	case e != nil && e.Code == 0 && !d.s.cfg.implicit() && (isTimeout(e) || closedByPeer(e)):
		e.Err = fmt.Errorf("%w; %s", e.Err, d.s.cfg.silenceHint())
		return e
	case e != nil:
		return e
	case r.Class() != 2:
		return refusedBy(OpGreeting, r)
	}
	return nil
}

// hello says EHLO; or HELO where that is not understood and nothing that only EHLO gives is needed.
func (d *dialogue) hello() *Error {
	s, c := d.s, d.s.cfg
	line := "EHLO " + c.localName(s.raw)
	r, e := d.command(OpEHLO, line, line, c.Timeouts.Command)
	if e != nil {
		return e
	}
	s.ext = wire.Extensions{}
	switch {
	case r.Class() == 2:
		s.ext = wire.ParseEHLO(d.raw)
		return nil
	case (r.Code == 500 || r.Code == 502) && c.clearAllowed() && !c.authenticates():
		line = "HELO " + c.localName(s.raw)
		if r, e = d.command(OpEHLO, line, line, c.Timeouts.Command); e != nil {
			return e
		}
		if r.Class() == 2 {
			return nil
		}
	}
	e = refusedBy(OpEHLO, r)
	if r.Class() == 5 {
		e.Err = fmt.Errorf("the relay does not like %q; Config.LocalName sets the name", line)
	}
	return e
}

// upgrade makes TLS of the connection with STARTTLS (RFC 3207), or leaves it in the clear where that is allowed.
func (d *dialogue) upgrade(ctx context.Context) *Error {
	s, c := d.s, d.s.cfg
	if !s.ext.Has("STARTTLS") {
		if c.clearAllowed() {
			return nil
		}
		return &Error{Op: OpSTARTTLS, Outcome: NotAccepted, permanent: true,
			Err: fmt.Errorf("the relay does not offer STARTTLS on port %s, or somebody on the way hides it; nothing was sent in clear (port 465 speaks TLS from the first byte; TLSNone would do without)", c.port)}
	}
	r, e := d.command(OpSTARTTLS, "STARTTLS", "STARTTLS", c.Timeouts.Command)
	if e != nil {
		return e
	}
	if r.Class() != 2 {
		return refusedBy(OpSTARTTLS, r)
	}
	if s.replies.Buffered() > 0 {
		// Somebody on the way wants them to be read as if they came through TLS (CVE-2011-0411).
		return &Error{Op: OpSTARTTLS, Outcome: NotAccepted, Err: errors.New("there were more bytes behind the reply, in the clear")}
	}
	if e := d.startTLS(ctx); e != nil {
		return e
	}
	return d.hello()
}

// refusedBy is the error of a reply that is not the one hoped for.
func refusedBy(op Op, r wire.Reply) *Error {
	return &Error{Op: op, Reply: publicReply(r), Outcome: NotAccepted}
}

// command writes a command and reads its reply; show is how it looks in a trace.
func (d *dialogue) command(op Op, show, line string, limit time.Duration) (wire.Reply, *Error) {
	d.s.traceCommand(d.ctx, show)
	if _, err := d.s.conn.Write([]byte(line + "\r\n")); err != nil {
		// The relay may have said why it hangs up.
		if r, e := d.read(op, lastWords); e == nil {
			return wire.Reply{}, refusedBy(op, r)
		}
		return wire.Reply{}, &Error{Op: op, Outcome: NotAccepted, Err: lost(err)}
	}
	return d.read(op, limit)
}

// read reads one reply. A 421 is an error whatever it answers.
func (d *dialogue) read(op Op, limit time.Duration) (wire.Reply, *Error) {
	s := d.s
	s.cfg.opening.Store(op)
	deadline := time.Time{}
	if limit > 0 {
		deadline = time.Now().Add(limit)
	}
	if op == OpAuth && !d.authBy.IsZero() {
		deadline = d.authBy
	}
	s.raw.SetReadDeadline(deadline)
	if d.ctx.Err() != nil { // the deadline that ended it has just been overwritten
		return wire.Reply{}, &Error{Op: op, Outcome: NotAccepted, Err: conn.ContextError(d.ctx)}
	}
	r, raw, err := s.readReply(op == OpEHLO || op == OpAuth)
	d.raw = raw
	switch {
	case err != nil && isTimeout(err):
		err = &conn.TimeoutError{Step: conn.Step(op), After: limit}
		fallthrough
	case err != nil:
		return r, &Error{Op: op, Outcome: NotAccepted, Err: lost(err)}
	}
	if t := s.cfg.Trace; t != nil && t.Reply != nil {
		shown := publicReply(r)
		if op == OpAuth {
			if r.Code == 334 {
				shown.Message = redacted
			}
		}
		t.Reply(d.ctx, s.id, op, shown)
	}
	if r.Code == 421 {
		return r, refusedBy(op, r)
	}
	return r, nil
}

// leave says QUIT after a failure that leaves the relay listening. The reply is not read.
func (d *dialogue) leave(e *Error) {
	if e.Code != 0 && e.Code != 421 || e.permanent && e.Op != OpTLS {
		d.s.conn.Write([]byte("QUIT\r\n"))
	}
}

// localName is the argument of EHLO (RFC 5321, 4.1.4): the full name of this host, else the address of the connection.
func (c *settings) localName(nc net.Conn) string {
	if c.LocalName != "" {
		return c.LocalName
	}
	host, err := os.Hostname()
	if err == nil && strings.Contains(host, ".") && !strings.HasPrefix(host, "localhost.") && validDomain(host) {
		return host
	}
	addr, ok := nc.LocalAddr().(*net.TCPAddr)
	switch {
	case !ok:
		return "[127.0.0.1]"
	case addr.IP.To4() != nil:
		return "[" + addr.IP.To4().String() + "]"
	}
	return "[IPv6:" + addr.IP.String() + "]"
}
