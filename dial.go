package smtprelay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/wire"
)

// dial opens a connection and takes it to the point where a transaction can begin: TCP, TLS or greeting, EHLO, STARTTLS,
// TLS, EHLO again, and AUTH if that cannot lead the first transaction. The end of ctx ends it.
//
// Who gets an error calls leave, which returns when the relay has closed the connection.
func (c *settings) dial(ctx context.Context, s *session) (leave func(), e *Error) {
	began := time.Now()
	if t := c.Trace; t != nil && t.DialStart != nil {
		t.DialStart(ctx, DialStartInfo{Name: c.Name, Addr: c.Addr, Conn: s.id})
	}
	c.stats.dials.Add(1)
	leave, e, again := c.connect(ctx, s)
	if again && ctx.Err() == nil { // the question about refused chunks, which is not asked again
		leave()
		leave = func() {}
		if ctx.Err() == nil { // it may have ended meanwhile, and the wait for the relay's close with it
			leave, e, _ = c.connect(ctx, s)
		}
	}
	if e != nil && e.Op == OpAuth && e.Reply.Code/100 == 5 && c.Auth != nil && ctx.Err() == nil { // a fresh token may do
		leave()
		leave, e, _ = c.connect(ctx, s)
	}
	info := DialDoneInfo{Name: c.Name, Addr: c.Addr, Remote: s.remote, Conn: s.id, Took: time.Since(began)}
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
	return leave, e
}

// connect is one try of dial, which makes s a connection. An address that fails before AUTH is followed by the next one, with
// one connection at a time. again: it has failed at the question about refused chunks.
func (c *settings) connect(ctx context.Context, s *session) (leave func(), _ *Error, again bool) {
	c.opening.Store(OpDial)
	limit := c.Timeouts.Dial
	if c.Dial != nil {
		nc, err := dialTCP(ctx, c.Dial, c.Addr, limit)
		if err != nil {
			return func() {}, c.notReached(err), false
		}
		return c.open(ctx, nc, s, false)
	}
	began := time.Now()
	addrs, err := c.lookup(ctx, limit)
	if err != nil {
		return func() {}, c.notReached(err), false
	}
	addrs = c.nodes.order(addrs, s.node, began)
	left := limit - time.Since(began) // for TCP, of all addresses
	var furthest *Error
	var remote string
	for i, greeted := 0, 0; ; i++ {
		began := time.Now()
		s.node, s.remote = addrs[i], addrs[i].String()
		nc, err := dialTCP(ctx, new(net.Dialer).DialContext, s.remote, shareOf(limit, left, len(addrs)-i))
		left -= time.Since(began)
		leave, e := func() {}, (*Error)(nil)
		if err != nil {
			e = c.notReached(err)
		} else {
			greeted++
			leave, e, again = c.open(ctx, nc, s, i+1 < len(addrs) && greeted < maxNodes)
		}
		switch {
		case e == nil:
			c.nodes.worked(s.node)
			return nil, nil, false
		case ctx.Err() != nil, !e.ofNode(), len(addrs) == 1:
			return leave, e, again
		}
		c.nodeFailed(s.node, e, began)
		if furthest == nil || e.further(furthest) {
			furthest, remote = e, s.remote
		}
		if i+1 == len(addrs) || greeted == maxNodes || limit > 0 && left <= 0 {
			s.remote = remote
			return leave, furthest.ofAll(remote, i+1), false
		}
		leave()
		if ctx.Err() != nil {
			return func() {}, e, false
		}
		c.opening.Store(OpDial)
	}
}

// open takes nc, which a try of dial has opened, to where s is ready. hurry: there are other addresses.
func (c *settings) open(ctx context.Context, nc net.Conn, s *session, hurry bool) (leave func(), _ *Error, again bool) {
	if addr := nc.RemoteAddr(); addr != nil {
		s.remote = addr.String()
	}
	var e *conn.OpenError
	if s.Conn, leave, e = conn.Open(ctx, nc, c.conns, s, c.connTrace(s.id), hurry); e != nil {
		return leave, c.explain(ctx, e), e.Step == conn.StepBdat
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
	return nil, nil, false
}

// notReached is the error of a connection that was not opened because of err.
func (c *settings) notReached(err error) *Error {
	return &Error{Op: OpDial, subject: c.Addr, Outcome: NotAccepted, Scope: ScopeRelay, Err: err}
}

// explain makes an Error of the reason why a connection could not be opened, with what to do about it.
func (c *settings) explain(ctx context.Context, failed *conn.OpenError) *Error {
	e := &Error{Op: opOf(failed.Step), Outcome: NotAccepted, Scope: ScopeRelay, Err: failed.Err, permanent: failed.Permanent}
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
	case e.Op == OpTLS, alertText(e.Err) != "": // with TLS 1.3 the relay refuses after the handshake is over here
		c.explainTLS(e)
	case e.Op == OpGreeting && errors.Is(e.Err, wire.ErrMalformed):
		e.Err = fmt.Errorf("%w; %s", e.Err, noSMTP)
		e.permanent = true
	case e.Op == OpGreeting && e.Reply.Code == 0 && !c.implicit() && (conn.IsTimeout(e.Err) || conn.ClosedByPeer(e.Err)):
		e.Err = fmt.Errorf("%w; %s", e.Err, c.silenceHint())
	case e.Op == OpEHLO && e.Reply.Code/100 == 5:
		e.Err = fmt.Errorf("the relay does not like %q; Config.LocalName sets the name", failed.Said)
	case errors.Is(e.Err, conn.ErrNoSTARTTLS):
		e.Err = fmt.Errorf("the relay does not offer STARTTLS on port %s, or somebody on the way hides it; nothing was sent in clear (port 465 speaks TLS from the first byte; TLSNone would do without)", c.port)
	case errors.Is(e.Err, conn.ErrClearAuth):
		e.Err = c.explainClearAuth()
	case e.Op == OpAuth:
		if not, ok := e.Err.(*conn.NotOfferedError); ok {
			e.Err = fmt.Errorf("Config.Auth has chosen %q: the relay offers %s", not.Mechanism, c.offered(not.Offered))
			if failed.Clear && failed.TLSOffered {
				e.Err = fmt.Errorf("%w, and it offers STARTTLS: use TLSStartTLS, or smtp:// in a URL", e.Err)
			}
		}
		c.explainAuth(e)
	}
}

// noSMTP is the advice where something else than a relay has answered.
const noSMTP = "this is no SMTP server; check the port"

// explainSilence adds to e, the error of a message that was not accepted, what may be the reason where the relay has offered
// PIPELINING and does not answer a group of commands.
func (c *settings) explainSilence(e *Error, ext *wire.Extensions) {
	switch e.Op {
	case OpRset, OpMail, OpRcpt, OpData:
		if c.Pipelining != PipelineOff && e.Outcome == NotAccepted && e.Timeout() && ext.Has("PIPELINING") {
			e.Err = fmt.Errorf("%w; if this happens often, something on the way may break PIPELINING: set Config.Pipelining to PipelineOff", e.Err)
		}
	}
}

// connOptions are what the connections of a Client have in common.
func (c *settings) connOptions() *conn.Options {
	t := c.Timeouts
	o := &conn.Options{
		Timeouts: conn.Timeouts{Greeting: t.Greeting, TLS: t.TLS, Command: t.Command, First: t.Outage, Data: t.Data, Write: t.Write,
			Unacked: t.Unacked, FinalReply: t.FinalReply, Drain: t.Drain, Overlap: t.Overlap, Quit: t.Quit},
		LocalName:   c.localName,
		Pipelining:  c.Pipelining != PipelineOff,
		Overlap:     c.Pipelining == PipelineAuto,
		Chunking:    c.Chunking,
		MaxInFlight: c.MaxInFlight,
		Implicit:    c.implicit(),
		Clear:       c.clear,
		Secrets:     func() (username, password string) { return c.Username, c.password.reveal() },
		Said:        &c.said,
		Profile:     relay{&c.profile, &c.stats},
		Progress:    func(step conn.Step) { c.opening.Store(opOf(step)) },
	}
	if c.TLS != TLSNone {
		o.TLS = c.tls
	}
	if c.authenticates() {
		o.Mechanism = c.mechanism
		if c.Auth == nil {
			o.OtherMechanism = c.otherMechanism
		}
	}
	return o
}

// dialTCP opens a connection to addr within limit, 0 for any time.
func dialTCP(ctx context.Context, dial func(ctx context.Context, network, addr string) (net.Conn, error), addr string, limit time.Duration) (net.Conn, error) {
	ctx, cancel := within(ctx, limit)
	defer cancel()
	nc, err := dial(ctx, "tcp", addr)
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

// within returns ctx with a time limit, 0 for none.
func within(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	if limit <= 0 {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, limit)
}

// DialControl returns a function for the Control of the net.Dialer behind a [Config].Dial: the kernel gives a connection up once
// what was sent has had no acknowledgement for that long. It is needed where Dial returns a connection that hides its
// socket, such as one through a proxy: where that is a *net.TCPConn, or has a SyscallConn of its own, Timeouts.Unacked does the same.
// It does nothing on systems other than Linux, for networks other than TCP, and where unacked is 0 or less.
func DialControl(unacked time.Duration) func(network, address string, c syscall.RawConn) error {
	return func(network, _ string, c syscall.RawConn) error {
		if !strings.HasPrefix(network, "tcp") || unacked <= 0 {
			return nil
		}
		var err error
		if gone := c.Control(func(fd uintptr) { err = conn.SetUnacked(fd, unacked) }); gone != nil {
			return gone
		}
		return err
	}
}

// localName is the argument of EHLO.
func (c *settings) localName(nc net.Conn) string {
	if c.LocalName != "" {
		return c.LocalName
	}
	host, _ := os.Hostname() // "" where it is not known
	return ehloName(host, nc.LocalAddr())
}

// ehloName is the name of this host if it is a full one, else the literal of its address on the connection (RFC 5321, 4.1.4).
func ehloName(host string, local net.Addr) string {
	host = strings.TrimSuffix(host, ".")
	if strings.Contains(host, ".") && !strings.HasPrefix(strings.ToLower(host), "localhost.") && validHostName(host) {
		return host
	}
	if addr, ok := local.(*net.TCPAddr); ok {
		if ip, ok := netip.AddrFromSlice(addr.IP); ok {
			return addressLiteral(ip)
		}
	}
	return "[127.0.0.1]"
}

// addressLiteral is addr as it stands in EHLO (RFC 5321, 4.1.3).
func addressLiteral(addr netip.Addr) string {
	if addr = addr.Unmap().WithZone(""); addr.Is4() {
		return "[" + addr.String() + "]"
	}
	return "[IPv6:" + addr.String() + "]"
}
