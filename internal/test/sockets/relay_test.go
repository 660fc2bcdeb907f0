package sockets

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/emersion/go-smtp"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtptest"
)

// The three kinds of relays: smtptest, go-smtp's server, and the strict relay of this package. Each is started for one client,
// and its ledger is complete once it is closed.

// relayMake is a kind of relay and how its connections are protected.
type relayMake string

const (
	smtptestClear    relayMake = "smtptest"
	smtptestStartTLS relayMake = "smtptest-starttls"
	smtptestTLS      relayMake = "smtptest-tls"
	goSMTPClear      relayMake = "go-smtp"
	goSMTPTLS        relayMake = "go-smtp-tls"
	strictClear      relayMake = "strict"
	strictTLS        relayMake = "strict-tls"
)

var relayMakes = []relayMake{smtptestClear, smtptestStartTLS, smtptestTLS, goSMTPClear, goSMTPTLS, strictClear, strictTLS}

func (m relayMake) isFake() bool { return strings.HasPrefix(string(m), "smtptest") }

func (m relayMake) isTLS() bool { return strings.HasSuffix(string(m), "-tls") }

// setup says which relay is started.
type setup struct {
	kind     relayMake
	chunking bool // used if the relay offers it
	maxConns int
	habits   habits
	behind   smtptest.Habit // for smtptest, as are the next two
	dotDelay time.Duration  // the delay of the reply to the final dot
	fault    smtptest.Fault // the zero value means none
	proxied  bool
	weather  weather // of the proxy
}

// forgets reports whether some commands are never answered.
func (s setup) forgets() bool { return s.behind == smtptest.HabitDiscard || s.fault.Discard }

// relay is a running relay.
type relay struct {
	setup
	config smtprelay.Config // for its client
	ledger *ledger
	front  *counter // nil for smtptest without a proxy
	proxy  *proxy   // nil without a proxy
	end    func()
	fake   *smtptest.Server // nil for other kinds
}

// start starts a relay that accepts the messages ms.
func start(t testing.TB, s setup, ms []*message) *relay {
	r := &relay{setup: s, ledger: newLedger(ms)}
	var addr string
	if s.kind.isFake() {
		addr = r.startFake(ms)
	} else {
		l := listen(t)
		addr = l.Addr().String()
		r.front = count(l, s)
		r.config.TLS = smtprelay.TLSNone
		var serveOn net.Listener = r.front
		if s.kind.isTLS() {
			r.config.TLS, r.config.TLSConfig = smtprelay.TLSImplicit, &tls.Config{RootCAs: own.roots}
			serveOn = tls.NewListener(serveOn, &tls.Config{Certificates: []tls.Certificate{own.cert}})
		}
		switch s.kind {
		case strictClear, strictTLS:
			r.end = newStrict(serveOn, s.habits, r.ledger).close
		default:
			r.end = serveGoSMTP(t, serveOn, s.habits, r.ledger)
		}
	}
	if s.proxied {
		r.front = count(listen(t), s)
		r.proxy = newProxy(r.front, addr, s.weather)
		addr = r.front.Addr().String()
	}
	r.config.Addr = addr
	r.config.LocalName = "client.example"
	r.config.Limits.MaxConns = s.maxConns
	setChunking(&r.config, s.chunking)
	return r
}

// close ends the relay when the client is closed, and completes the ledger.
func (r *relay) close(t testing.TB) {
	if r.proxy != nil {
		r.proxy.close()
	}
	if r.fake != nil {
		eventually(t, "smtptest reads its connections to the end", func() bool { return r.fake.Stats().Open == 0 })
	}
	r.end()
	if r.front != nil && r.front.exceeded > 0 {
		r.ledger.complain("%d connections at once, MaxConns is %d", r.front.exceeded, r.maxConns)
	}
	if r.fake != nil {
		for _, m := range r.fake.Messages() {
			r.ledger.accept(m.From, m.To, m.Body)
		}
	}
}

func (r *relay) startFake(ms []*message) (addr string) {
	s := smtptest.NewUnstartedServer()
	s.MaxConns, s.MaxMessages, s.Chunking, s.Behind = -1, -1, !r.habits.noChunking, r.behind
	s.KeepRefusedChunks, s.KeepEnvelopeOnRset = r.habits.readsRefusedChunks, r.habits.keepsEnvelope
	s.NoAuth, s.NoTLS = !r.habits.refusesAuth, r.kind == smtptestClear
	s.TLS = &tls.Config{Certificates: []tls.Certificate{own.cert}}
	s.Reject = map[string]string{}
	if r.habits.noSize {
		s.MaxSize = -1
	}
	for _, m := range ms {
		for _, to := range m.to {
			if isRefused(to) {
				s.Reject[to] = refusal(to)
			}
		}
	}
	if r.kind == smtptestTLS {
		s.StartTLS()
	} else {
		s.Start()
	}
	s.Fault(smtptest.Fault{Count: -1, When: r.strange})
	if r.habits.refusesMail {
		s.Fault(smtptest.Fault{At: smtptest.Mail, Reply: "550 5.7.1 not from you", Count: -1})
	}
	if r.dotDelay > 0 {
		s.Fault(smtptest.Fault{At: smtptest.FinalDot, Delay: r.dotDelay, Count: -1})
	}
	if r.fault.At != 0 {
		s.Fault(r.fault)
	}
	r.config, r.end, r.fake = s.Config(), s.Close, s
	return s.Addr()
}

// strange complains about commands that come from a body. It lets no fault strike.
func (r *relay) strange(e smtptest.Event) bool {
	switch {
	case e.Step == smtptest.Mail && r.ledger.messages[idOf(e.From)] == nil:
		r.ledger.complain("smuggled: %s", e.Line)
	case e.Step == smtptest.Rcpt && r.ledger.messages[idOf(e.Rcpt)] == nil:
		r.ledger.complain("smuggled: %s", e.Line)
	}
	return false
}

// serveGoSMTP serves with go-smtp until the function that it returns is called, after all clients have disconnected.
func serveGoSMTP(t testing.TB, l net.Listener, h habits, led *ledger) (end func()) {
	b := &backend{ledger: led}
	s := smtp.NewServer(b)
	s.Domain = "go-smtp.example"
	s.ErrorLog = log.New(io.Discard, "", 0)
	if !h.noSize {
		s.MaxMessageBytes = 64 << 20
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	return func() {
		l.Close()
		<-served // Serve must end before Shutdown, which waits for connections while Serve could still add some
		if err := s.Shutdown(context.Background()); err != nil && !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		b.reading.Wait()
	}
}

// backend gets the messages from go-smtp's server.
type backend struct {
	ledger  *ledger
	reading sync.WaitGroup // bodies, which go-smtp reads in separate goroutines if they arrive in chunks
}

func (b *backend) NewSession(*smtp.Conn) (smtp.Session, error) { return &session{backend: b}, nil }

type session struct {
	*backend
	from string
	to   []string
}

func (s *session) Mail(from string, _ *smtp.MailOptions) error {
	if s.ledger.messages[idOf(from)] == nil {
		s.ledger.complain("smuggled: MAIL from <%s>", from)
	}
	s.from, s.to = from, nil
	return nil
}

func (s *session) Rcpt(to string, _ *smtp.RcptOptions) error {
	if s.ledger.messages[idOf(to)] == nil {
		s.ledger.complain("smuggled: RCPT to <%s>", to)
	}
	switch {
	case strings.HasPrefix(to, "gone"):
		return &smtp.SMTPError{Code: 550, EnhancedCode: smtp.EnhancedCode{5, 1, 1}, Message: "no such user"}
	case isRefused(to):
		return &smtp.SMTPError{Code: 450, EnhancedCode: smtp.EnhancedCode{4, 2, 1}, Message: "try again later"}
	}
	s.to = append(s.to, to)
	return nil
}

func (s *session) Data(r io.Reader) error {
	s.reading.Add(1)
	defer s.reading.Done()
	from, to := s.from, s.to
	body, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	s.ledger.accept(from, to, body)
	return nil
}

func (s *session) Reset()        { s.from, s.to = "", nil }
func (s *session) Logout() error { return nil }

// own is the certificate of all relays here.
var own = func() (o struct {
	cert  tls.Certificate
	roots *x509.CertPool
}) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Date(2084, 1, 1, 0, 0, 0, 0, time.UTC),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	o.cert = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	o.roots = x509.NewCertPool()
	o.roots.AddCert(parsed)
	return o
}()

// eventually waits until is returns true.
func eventually(t testing.TB, what string, is func() bool) {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for range 30_000 {
		if is() {
			return
		}
		<-tick.C
	}
	t.Errorf("this did not happen: %s", what)
}
