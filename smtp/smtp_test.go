// Here belongs that package smtp does what net/smtp does, where it does not say otherwise: the ideas of net/smtp's own tests,
// and the errors of both on the same relay side by side.
package smtp_test

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/md5"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	netsmtp "net/smtp"
	"net/textproto"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/smtprelay/smtprelay"
	"github.com/smtprelay/smtprelay/smtp"
	"github.com/smtprelay/smtprelay/smtptest"
)

// The types are net/smtp's own, so that what was written for it compiles unchanged.
var (
	_ func(string, netsmtp.Auth, string, []string, []byte) error = smtp.SendMail
	_ func(string, string, string, string) netsmtp.Auth          = smtp.PlainAuth
	_ func(string, string) netsmtp.Auth                          = smtp.CRAMMD5Auth
	_ func(string) (*netsmtp.Client, error)                      = smtp.Dial
	_ func(net.Conn, string) (*netsmtp.Client, error)            = smtp.NewClient
	_ *netsmtp.ServerInfo                                        = (*smtp.ServerInfo)(nil)
)

// trusted is the relay whose certificate this process trusts, as if the system did.
var trusted *smtptest.Server

func TestMain(m *testing.M) {
	trusted = smtptest.NewServer()
	dir, err := os.MkdirTemp("", "smtp")
	if err != nil {
		panic(err)
	}
	file := filepath.Join(dir, "roots.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: trusted.Certificate().Raw}), 0o600); err != nil {
		panic(err)
	}
	os.Setenv("SSL_CERT_FILE", file)
	code := m.Run()
	trusted.Close()
	os.RemoveAll(dir)
	os.Exit(code)
}

var msg = []byte("Subject: hi\r\n\r\nhi\r\n")

// newRelay is a relay in the clear on this machine, with its transcript. The pools are closed before it is.
func newRelay(t *testing.T, set ...func(*smtptest.Server)) (*smtptest.Server, *bytes.Buffer) {
	t.Helper()
	transcript := &bytes.Buffer{}
	relay := smtptest.NewUnstartedServer()
	relay.NoTLS, relay.Username, relay.Password, relay.Log = true, "ann", "s3cret", transcript
	for _, f := range set {
		f(relay)
	}
	relay.Start()
	t.Cleanup(relay.Close)
	t.Cleanup(func() {
		if err := smtp.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return relay, transcript
}

// plain is made anew for each call, as programs do.
func plain(relay *smtptest.Server) smtp.Auth {
	host, _, _ := net.SplitHostPort(relay.Addr())
	return smtp.PlainAuth("", "ann", "s3cret", host)
}

// together calls f so many times, a number at once.
func together(n, atOnce int, f func(i int)) {
	numbers := make(chan int)
	var calls sync.WaitGroup
	for range atOnce {
		calls.Go(func() {
			for i := range numbers {
				f(i)
			}
		})
	}
	for i := range n {
		numbers <- i
	}
	close(numbers)
	calls.Wait()
}

func TestCallsWithFreshCredentialsShareTenConnections(t *testing.T) {
	relay, _ := newRelay(t)
	together(300, 30, func(i int) {
		if err := smtp.SendMail(relay.Addr(), plain(relay), "shop@example.com", []string{"ann@example.org"}, fmt.Appendf(nil, "Subject: %d\r\n\r\nhi\r\n", i)); err != nil {
			t.Errorf("message %d: %v", i, err)
		}
	})
	if got := len(relay.Messages()); got != 300 || relay.Stats().Duplicates != 0 {
		t.Errorf("got %d messages and %d duplicates, want 300 and none", got, relay.Stats().Duplicates)
	}
	if relay.Stats().MaxOpen > 10 || relay.Stats().Auths > 10 || len(relay.Conns()) > 10 || relay.Stats().Refused != 0 {
		t.Errorf("got %d connections, %d at once, %d AUTHs, want one pool of 10", len(relay.Conns()), relay.Stats().MaxOpen, relay.Stats().Auths)
	}
}

func TestOtherCredentialsHaveAPoolOfTheirOwn(t *testing.T) {
	relay, _ := newRelay(t)
	host, _, _ := net.SplitHostPort(relay.Addr())
	if err := smtp.SendMail(relay.Addr(), plain(relay), "a@x.example", []string{"b@y.example"}, msg); err != nil {
		t.Fatal(err)
	}
	for _, wrong := range []smtp.Auth{smtp.PlainAuth("", "ann", "other", host), smtp.PlainAuth("", "eve", "s3cret", host)} {
		err := smtp.SendMail(relay.Addr(), wrong, "a@x.example", []string{"b@y.example"}, msg)
		if e, ok := err.(*textproto.Error); !ok || e.Code != 535 {
			t.Errorf("got %v, want the refusal of these credentials", err)
		}
	}
	if err := smtp.SendMail(relay.Addr(), nil, "a@x.example", []string{"b@y.example"}, msg); err == nil {
		t.Error("a call without credentials has used the connection of one that has them")
	}
}

func TestPoolsAreBounded(t *testing.T) {
	relay, _ := newRelay(t, func(s *smtptest.Server) { s.MaxConns = 1000 })
	host, _, _ := net.SplitHostPort(relay.Addr())
	for i := range 200 {
		if err := smtp.SendMail(relay.Addr(), smtp.PlainAuth(fmt.Sprint(i), "ann", "s3cret", host), "a@x.example", []string{"b@y.example"}, msg); err != nil {
			t.Fatal(err)
		}
	}
	if got := relay.Stats().MaxOpen; got > 128 { // 64, and those that are about to close
		t.Errorf("got %d connections open at once", got)
	}
}

// loginAuth is LOGIN as many programs have it, with the state of the exchange in it.
type loginAuth struct {
	username, password string
	step               int
}

func (a *loginAuth) Start(*smtp.ServerInfo) (string, []byte, error) {
	a.step = 0
	return "LOGIN", []byte{}, nil
}

func (a *loginAuth) Next(_ []byte, more bool) ([]byte, error) {
	if !more {
		return nil, nil
	}
	a.step++
	switch a.step {
	case 1:
		return []byte(a.username), nil
	case 2:
		return []byte(a.password), nil
	}
	return nil, errors.New("unexpected challenge")
}

func TestAuthThatKeepsStateIsNotShared(t *testing.T) {
	relay, _ := newRelay(t)
	send := func(a smtp.Auth, i int) {
		if err := smtp.SendMail(relay.Addr(), a, "a@x.example", []string{"b@y.example"}, fmt.Appendf(nil, "Subject: %d\r\n\r\nhi\r\n", i)); err != nil {
			t.Errorf("message %d: %v", i, err)
		}
	}
	send(&loginAuth{username: "ann", password: "s3cret"}, 0) // credentials that were never accepted are tried on one connection at a time
	arrived := make(chan struct{})
	var n atomic.Int32
	relay.Fault(smtptest.Fault{At: smtptest.Auth, Count: -1, When: func(smtptest.Event) bool {
		if n.Add(1) == 2 { // two exchanges are under way
			close(arrived)
		}
		<-arrived
		return true
	}})
	shared := &loginAuth{username: "ann", password: "s3cret"}
	together(100, 20, func(i int) { send(shared, 1+i) })
	if got := len(relay.Messages()); got != 101 || relay.Stats().Auths > 10 || shared.step != 0 {
		t.Errorf("got %d messages by %d AUTHs, and the caller's own was asked %d times", got, relay.Stats().Auths, shared.step)
	}
}

// tokenAuth cannot be compared.
type tokenAuth struct{ token func() string }

func (a *tokenAuth) Start(*smtp.ServerInfo) (string, []byte, error) {
	return "PLAIN", []byte("\x00ann\x00" + a.token()), nil
}
func (a *tokenAuth) Next([]byte, bool) ([]byte, error) {
	return nil, errors.New("no challenge expected")
}

func TestAuthThatCannotBeComparedIsNotKept(t *testing.T) {
	relay, _ := newRelay(t)
	for i := range 3 {
		if err := smtp.SendMail(relay.Addr(), &tokenAuth{func() string { return "s3cret" }}, "a@x.example", []string{"b@y.example"}, msg); err != nil {
			t.Fatal(err)
		}
		if got := len(relay.Conns()); got != i+1 || relay.Conns()[i].Commands["QUIT"] != 1 {
			t.Errorf("got %d connections after %d calls, the last without QUIT", got, i+1)
		}
	}
}

func TestRefusalIsWhatNetSMTPMakesOfIt(t *testing.T) {
	for _, tt := range []struct {
		why   string
		at    smtptest.Step
		reply string
	}{
		{"the greeting", smtptest.Connect, "554 5.7.1 no"},
		{"too many connections", smtptest.Connect, "421 4.7.0 too many connections"},
		{"AUTH", smtptest.Auth, "535 5.7.8 bad credentials"},
		{"the sender", smtptest.Mail, "550 5.7.1 not from there"},
		{"the sender for now", smtptest.Mail, "451 4.3.0 later"},
		{"a recipient", smtptest.Rcpt, "550 5.1.1 no such user"},
		{"a recipient without an enhanced code", smtptest.Rcpt, "550 no such user"},
		{"DATA", smtptest.Data, "554 5.5.1 no"},
		{"the message", smtptest.FinalDot, "552 5.3.4 too large"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			relay, _ := newRelay(t)
			relay.Fault(smtptest.Fault{At: tt.at, Reply: tt.reply, Count: -1, Rcpt: map[bool]string{true: "c@y.example"}[tt.at == smtptest.Rcpt]}) // the second
			to := []string{"b@y.example", "c@y.example"}
			want, ok := netsmtp.SendMail(relay.Addr(), plain(relay), "a@x.example", to, msg).(*textproto.Error)
			if !ok {
				t.Fatalf("net/smtp itself returns %v", want)
			}
			err := smtp.SendMail(relay.Addr(), plain(relay), "a@x.example", to, msg)
			if got, ok := err.(*textproto.Error); !ok || *got != *want {
				t.Errorf("got %T %v, want %v as of net/smtp", err, err, want)
			}
			if n := len(relay.Messages()); n != 0 {
				t.Errorf("the relay has taken %d messages", n)
			}
		})
	}
}

func TestWhatMayHaveBeenAcceptedIsNoRefusal(t *testing.T) {
	for why, fault := range map[string]smtptest.Fault{
		"the connection is lost after the final dot": {At: smtptest.Accepted, Drop: true},
		"a reply that means nothing":                 {At: smtptest.FinalDot, Reply: "354 go on"},
	} {
		t.Run(why, func(t *testing.T) {
			relay, _ := newRelay(t)
			relay.Fault(fault)
			err := smtp.SendMail(relay.Addr(), plain(relay), "a@x.example", []string{"b@y.example"}, msg)
			e, ok := errors.AsType[*smtprelay.Error](err)
			if !ok || e.Outcome != smtprelay.Unknown {
				t.Fatalf("got %v, want an unknown outcome", err)
			}
			if _, ok := errors.AsType[*textproto.Error](err); ok {
				t.Errorf("a *textproto.Error is found in %v", err)
			}
			if got := len(relay.Conns()); got != 1 {
				t.Errorf("got %d connections, want no second try", got)
			}
		})
	}
}

func TestLostConnectionIsNotTriedAgain(t *testing.T) {
	relay, _ := newRelay(t)
	fault := relay.Fault(smtptest.Fault{At: smtptest.Data, Drop: true, Count: -1})
	err := smtp.SendMail(relay.Addr(), plain(relay), "a@x.example", []string{"b@y.example"}, msg)
	if e, ok := errors.AsType[*smtprelay.Error](err); !ok || e.Outcome != smtprelay.NotAccepted || fault.Hits() != 1 {
		t.Errorf("got %v after %d tries, want one that was not accepted", err, fault.Hits())
	}
}

func TestSTARTTLSIsUsedWhereItIsOffered(t *testing.T) {
	t.Cleanup(func() { smtp.Shutdown(context.Background()) })
	host, _, _ := net.SplitHostPort(trusted.Addr())
	auth := smtp.PlainAuth("", trusted.Username, trusted.Password, host)
	if err := smtp.SendMail(trusted.Addr(), auth, "a@x.example", []string{"b@y.example"}, msg); err != nil {
		t.Fatal(err)
	}
	if conns := trusted.Conns(); len(conns) != 1 || !conns[0].TLS || !conns[0].Authenticated {
		t.Errorf("got %+v, want one connection with TLS and AUTH", conns)
	}
	// The certificate of another relay is trusted by nobody.
	relay, _ := newRelay(t, func(s *smtptest.Server) { s.NoTLS = false })
	err := smtp.SendMail(relay.Addr(), plain(relay), "a@x.example", []string{"b@y.example"}, msg)
	if e, ok := errors.AsType[*smtprelay.Error](err); !ok || e.Op != smtprelay.OpTLS || len(relay.Messages()) != 0 || relay.Stats().Auths != 0 {
		t.Errorf("got %v, %d messages and %d AUTHs, want an error of TLS and nothing sent", err, len(relay.Messages()), relay.Stats().Auths)
	}
}

func TestPlainAuthKeepsItsRules(t *testing.T) {
	relay, transcript := newRelay(t)
	for why, auth := range map[string]smtp.Auth{"wrong host name": smtp.PlainAuth("", "ann", "s3cret", "other.example")} {
		err := smtp.SendMail(relay.Addr(), auth, "a@x.example", []string{"b@y.example"}, msg)
		if err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("got %v, want %q", err, why)
		}
	}
	smtp.Shutdown(t.Context())
	relay.Close()
	if strings.Contains(transcript.String(), ": AUTH") {
		t.Errorf("credentials were sent:\n%s", transcript)
	}
}

func TestRelayWithoutAUTHIsToldInNetSMTPsWords(t *testing.T) {
	relay, _ := newRelay(t, func(s *smtptest.Server) { s.NoAuth = true })
	err := smtp.SendMail(relay.Addr(), plain(relay), "a@x.example", []string{"b@y.example"}, msg)
	if err == nil || !strings.Contains(err.Error(), "smtp: server doesn't support AUTH") {
		t.Errorf("got %v", err)
	}
	if err := smtp.SendMail(relay.Addr(), nil, "", []string{"b@y.example"}, msg); err != nil || relay.Messages()[0].From != "" {
		t.Errorf("without credentials and sender: got %v", err)
	}
}

func TestPrologueIsNetSMTPsOnThisMachine(t *testing.T) {
	relay, transcript := newRelay(t)
	if err := smtp.SendMail(relay.Addr(), plain(relay), "a@x.example", []string{"b@y.example"}, msg); err != nil {
		t.Fatal(err)
	}
	smtp.Shutdown(t.Context())
	relay.Close()
	if !strings.Contains(transcript.String(), "C1: EHLO localhost\n") {
		t.Errorf("got\n%s\nwant EHLO localhost", transcript)
	}
}

func TestAddressesAreChecked(t *testing.T) {
	relay, _ := newRelay(t)
	for why, call := range map[string]struct {
		from string
		to   []string
	}{
		"a line end in the sender":  {"a@x.example>\r\nRCPT TO:<eve@evil.example", []string{"b@y.example"}},
		"a line end in a recipient": {"a@x.example", []string{"b@y.example\n"}},
		"nobody":                    {"a@x.example", nil},
	} {
		if err := smtp.SendMail(relay.Addr(), plain(relay), call.from, call.to, msg); err == nil {
			t.Errorf("%s: it was sent", why)
		}
	}
	for _, addr := range []string{"", "mail.example.com", "mail.example.com:no-such-service", "[::1"} {
		err := smtp.SendMail(addr, nil, "a@x.example", []string{"b@y.example"}, msg)
		if e, ok := errors.AsType[*smtprelay.Error](err); !ok || e.Op != smtprelay.OpConfig {
			t.Errorf("%q: got %v, want an error of the address", addr, err)
		}
	}
}

func TestCRAMMD5IsAnswered(t *testing.T) {
	relay, _ := newRelay(t, func(s *smtptest.Server) {
		s.Mechanisms = []string{"CRAM-MD5"}
		s.SASL = func(string) (smtptest.SASLServer, error) { return &cramServer{}, nil }
	})
	if err := smtp.SendMail(relay.Addr(), smtp.CRAMMD5Auth("ann", "s3cret"), "a@x.example", []string{"b@y.example"}, msg); err != nil {
		t.Error(err)
	}
}

type cramServer struct{ asked bool }

func (c *cramServer) Next(response []byte) (challenge []byte, done bool, err error) {
	const text = "<1.2@relay.example>"
	if !c.asked {
		c.asked = true
		return []byte(text), false, nil
	}
	mac := hmac.New(md5.New, []byte("s3cret"))
	mac.Write([]byte(text))
	if string(response) != fmt.Sprintf("ann %x", mac.Sum(nil)) {
		return nil, false, errors.New("wrong")
	}
	return nil, true, nil
}

func TestSendMailBeginsAnewAfterShutdown(t *testing.T) {
	relay, _ := newRelay(t)
	for i := range 2 {
		if err := smtp.SendMail(relay.Addr(), plain(relay), "a@x.example", []string{"b@y.example"}, msg); err != nil {
			t.Fatal(err)
		}
		if err := smtp.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
		if relay.Stats().Open != 0 || len(relay.Conns()) != i+1 || relay.Conns()[i].Commands["QUIT"] != 1 {
			t.Errorf("got %d open connections of %d", relay.Stats().Open, len(relay.Conns()))
		}
	}
}
