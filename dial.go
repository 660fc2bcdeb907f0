package smtprelay

import (
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
		leave = func() {}
		if ctx.Err() == nil { // it may have ended meanwhile, and the wait for the relay's close with it
			s, leave, e = c.connect(ctx, id)
		}
	}
	info := DialInfo{Conn: id, Addr: c.Addr, Took: time.Since(began)}
	if e != nil {
		c.stats.dialErrors.Add(1)
		info.Err = e
	} else {
		for _, keyword := range s.Extensions().Keywords {
			info.Extensions = append(info.Extensions, c.said.Scrub(keyword))
		}
		if state := s.TLS(); state != nil {
			info.TLSVersion, info.Resumed = state.Version, state.DidResume
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
	s := &session{id: id}
	var e *conn.OpenError
	if s.Conn, leave, e = conn.Open(ctx, nc, c.conns, s, c.connTrace(id)); e != nil {
		return nil, leave, c.explain(ctx, e)
	}
	limit := c.Limits.MaxMessagesPerConn
	for _, least := range []int{s.Extensions().Limits.MailMax, c.profile.maxMessages()} {
		if least > 0 && (limit == 0 || least < limit) {
			limit = least
		}
	}
	expires := time.Time{}
	if age := c.Limits.MaxConnAge; age > 0 {
		expires = s.Born().Add(age - rand.N(age/10+1))
	}
	s.Bound(limit, expires)
	return s, nil, nil
}

// explain makes an Error of the reason why a connection could not be opened, with what to do about it.
func (c *settings) explain(ctx context.Context, failed *conn.OpenError) *Error {
	e := &Error{Op: Op(failed.Step), Outcome: NotAccepted, Err: failed.Err, permanent: failed.Permanent}
	if failed.Reply.Code != 0 {
		e.Reply = publicReply(failed.Reply)
	}
	if failed.Clear {
		// Whoever said it, or would not speak TLS, may be somebody on the way.
		e.unproven = true
	}
	if ctx.Err() != nil && e.Err != nil {
		if e.Op == OpDial {
			e.subject = c.Addr
		}
		return e
	}
	c.advise(e, failed)
	return e
}

// advise adds to e, which failed became, what to do about it.
func (c *settings) advise(e *Error, failed *conn.OpenError) {
	switch {
	case e.Op == OpTLS:
		c.explainTLS(e)
	case e.Op == OpGreeting && e.Code == 0 && !c.implicit() && (conn.IsTimeout(e.Err) || conn.ClosedByPeer(e.Err)):
		e.Err = fmt.Errorf("%w; %s", e.Err, c.silenceHint())
	case e.Op == OpEHLO && e.Code/100 == 5:
		e.Err = fmt.Errorf("the relay does not like %q; Config.LocalName sets the name", failed.Said)
	case errors.Is(e.Err, conn.ErrNoSTARTTLS):
		e.Err = fmt.Errorf("the relay does not offer STARTTLS on port %s, or somebody on the way hides it; nothing was sent in clear (port 465 speaks TLS from the first byte; TLSNone would do without)", c.port)
	case errors.Is(e.Err, conn.ErrClearAuth):
		e.Err = c.explainClearAuth()
	case e.Op == OpAuth:
		if not, ok := e.Err.(*conn.NotOfferedError); ok {
			e.Err = fmt.Errorf("Config.Auth has chosen %q: the relay offers %s", not.Mechanism, c.offered(not.Offered))
		}
		if e.Err == nil {
			c.explainAuth(e)
		}
	}
}

// connOptions are what the connections of a Client have in common.
func (c *settings) connOptions() *conn.Options {
	t := c.Timeouts
	o := &conn.Options{
		Timeouts: conn.Timeouts{Greeting: t.Greeting, TLS: t.TLS, Command: t.Command, Data: t.Data, Write: t.Write,
			FinalReply: t.FinalReply, Overlap: t.Overlap, Quit: t.Quit},
		LocalName:   c.localName,
		Pipelining:  c.Pipelining != PipelineOff,
		Overlap:     c.Pipelining == PipelineAcross,
		Chunking:    c.Chunking,
		MaxInFlight: c.Limits.MaxInFlight,
		Implicit:    c.implicit(),
		Clear:       c.clear,
		Secrets:     func() (username, password string) { return c.Username, c.password.reveal() },
		Said:        &c.said,
		Profile:     relay{&c.profile, &c.stats},
		Progress:    func(step conn.Step) { c.opening.Store(Op(step)) },
	}
	if c.TLS != TLSNone {
		o.TLS = c.tls
	}
	if c.authenticates() {
		o.Mechanism = c.mechanism
	}
	return o
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
