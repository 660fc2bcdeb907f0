package smtptest

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"log"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/internal/netpipe"
)

// startBackend starts go-smtp's server. For the server, each conn is a plaintext connection that does not pipeline.
func (s *Server) startBackend() {
	b := smtp.NewServer(smtp.BackendFunc(newSession))
	b.Domain = s.Name
	b.AllowInsecureAuth = true // conn checks for TLS
	b.MaxLineLength = 0
	b.MaxMessageBytes = max(0, s.MaxSize)
	b.MaxRecipients = max(0, s.MaxRecipients)
	b.EnableSMTPUTF8 = s.offers("SMTPUTF8")
	b.EnableREQUIRETLS = s.offers("REQUIRETLS")
	b.EnableBINARYMIME = s.offers("BINARYMIME")
	b.EnableDSN = s.offers("DSN")
	b.EnableRRVS = s.offers("RRVS")
	b.ErrorLog = panicLog{}
	s.backend = b
	s.backends = &backListener{conns: make(chan net.Conn), done: make(chan struct{})}
	s.served = make(chan struct{})
	go func() { // ends when Close shuts b down
		b.Serve(s.backends)
		close(s.served)
	}()
}

// panicLog is go-smtp's log: it drops everything but panics, since clients that disconnect are normal here.
type panicLog struct{}

func (panicLog) Println(v ...any) {}

func (panicLog) Printf(format string, v ...any) {
	if strings.Contains(format, "panic") {
		log.Printf("smtptest: "+format, v...)
	}
}

// backListener hands the far ends of conns to go-smtp's server.
type backListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (l *backListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *backListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *backListener) Addr() net.Addr { return &net.UnixAddr{Net: "pipe", Name: "smtptest"} }

// backConn is go-smtp's end of its connection to a conn.
type backConn struct {
	*netpipe.Conn
	front *conn
}

// dialBackend gives the conn a new connection to go-smtp.
func (c *conn) dialBackend() bool {
	near, far := netpipe.New(0)
	select {
	case c.s.backends.conns <- &backConn{far, c}:
	case <-c.s.backends.done:
		return false
	}
	c.back, c.backR = near, bufio.NewReader(near)
	return c.reply() != "" // its greeting
}

// ask sends go-smtp a line and returns its reply, or "" if it is gone.
func (c *conn) ask(line string) string {
	c.line = append(append(c.line[:0], line...), "\r\n"...)
	c.back.Write(c.line)
	return c.reply()
}

// reply reads a reply of go-smtp; its lines are separated by "\n".
func (c *conn) reply() string {
	var lines []byte
	for {
		line, err := c.backR.ReadSlice('\n')
		if err != nil {
			return ""
		}
		line = bytes.TrimRight(line, "\r\n")
		if len(line) < 4 || line[3] != '-' {
			return string(append(lines, line...))
		}
		lines = append(append(lines, line...), '\n')
	}
}

// session is go-smtp's view of a client. While its methods run, the conn waits for go-smtp's reply, so they may use what the conn
// owns; only Reset and Logout run at other times, and do nothing.
type session struct{ c *conn }

func newSession(sc *smtp.Conn) (smtp.Session, error) {
	return session{sc.Conn().(*backConn).front}, nil
}

func (s session) Reset() {}

func (s session) Logout() error { return nil }

func (s session) AuthMechanisms() []string { return s.c.s.Mechanisms }

func (s session) Auth(mechanism string) (sasl.Server, error) {
	r := s.c.s
	switch {
	case r.NoAuth:
		return nil, smtp.ErrAuthUnsupported
	case !containsFold(r.Mechanisms, mechanism):
		return nil, smtp.ErrAuthUnknownMechanism
	case r.SASL != nil:
		return r.SASL(mechanism)
	case mechanism == sasl.Plain:
		return sasl.NewPlainServer(func(_, username, password string) error { return r.check(username, password) }), nil
	case mechanism == sasl.Login:
		return &loginServer{check: r.check}, nil
	}
	return nil, smtp.ErrAuthUnknownMechanism
}

func (s session) Mail(from string, opts *smtp.MailOptions) error {
	c := s.c
	if !c.authed && !c.s.NoAuth {
		return &smtp.SMTPError{Code: 550, EnhancedCode: smtp.NoEnhancedCode, Message: "Unauthenticated senders not allowed"}
	}
	o := c.ours // the parameters that go-smtp does not parse
	if o.Size == 0 {
		o.Size = opts.Size
	}
	o.Body, o.UTF8, o.RequireTLS = smtprelay.BodyType(opts.Body), opts.UTF8, opts.RequireTLS
	o.Return, o.EnvelopeID, o.Auth = smtprelay.DSNReturn(opts.Return), opts.EnvelopeID, opts.Auth
	c.env = envelope{open: true, from: c.path, mailOptions: o}
	return nil
}

func (s session) Rcpt(to string, opts *smtp.RcptOptions) error {
	s.c.env.to = append(s.c.env.to, s.c.path)
	o := smtprelay.RcptOptions{
		OriginalRecipientType:      smtprelay.DSNAddressType(opts.OriginalRecipientType),
		OriginalRecipient:          opts.OriginalRecipient,
		RequireRecipientValidSince: opts.RequireRecipientValidSince,
	}
	for _, n := range opts.Notify {
		o.Notify = append(o.Notify, smtprelay.DSNNotify(n))
	}
	s.c.env.rcptOptions = append(s.c.env.rcptOptions, o)
	s.c.recipients++
	return nil
}

// Data is called when the body begins, and takes the message when it ends. The conn reads the body itself: for DATA go-smtp gets
// only the final dot, for BDAT one empty chunk.
func (s session) Data(r io.Reader) error {
	if _, err := io.Copy(io.Discard, r); err != nil {
		return err // the client is gone, or has abandoned the message
	}
	return s.c.take()
}

// take makes a Message of what has arrived. Its error is how go-smtp is given the reply.
func (c *conn) take() error {
	s := c.s
	if c.msg.refused {
		return &smtp.SMTPError{Code: 554, EnhancedCode: smtp.EnhancedCode{5, 0, 0}, Message: "Message refused"}
	}
	if c.msg.tooBig() {
		return smtp.ErrDataTooLarge
	}
	m := Message{
		ID:          newID(),
		Conn:        c.stats.Conn,
		Nth:         c.events[Mail],
		From:        c.env.from,
		To:          c.env.to,
		MailOptions: c.env.mailOptions,
		RcptOptions: c.env.rcptOptions,
		Size:        c.msg.size,
		Chunked:     c.msg.chunked,
		Received:    time.Now(),
	}
	m.Body, m.SHA256 = c.msg.end()
	same := m.identity()
	c.msg.taken = true
	c.messages++

	if s.OnMessage != nil {
		s.OnMessage(m)
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	s.accepted++
	c.stats.Accepted++
	if s.seen[same] > 0 {
		s.duplicates++
	}
	s.seen[same]++
	s.messages = append(s.messages, m)
	s.forgetMessagesLocked()
	if s.grown != nil {
		close(s.grown)
		s.grown = nil
	}
	return &smtp.SMTPError{Code: 250, EnhancedCode: smtp.NoEnhancedCode, Message: "Ok: queued as " + m.ID}
}

// identity is a hash of envelope and body.
func (m *Message) identity() (sum [32]byte) {
	h := sha256.New()
	fmt.Fprintf(h, "%q %q %x", m.From, m.To, m.SHA256)
	h.Sum(sum[:0])
	return sum
}

// newID returns a queue ID that looks like SendGrid's: 22 characters of A-Za-z0-9_-.
func newID() string {
	var b [16]byte
	rand.Read(b[:])
	return base64.RawURLEncoding.EncodeToString(b[:])
}
