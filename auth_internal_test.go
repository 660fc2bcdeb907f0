package smtprelay

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/emersion/go-sasl"
	"github.com/smtprelay/smtprelay/internal/conn"
	"github.com/smtprelay/smtprelay/internal/netpipe"
	"github.com/smtprelay/smtprelay/internal/wire"
)

func TestLoginAnswersWhateverItIsAsked(t *testing.T) {
	for _, tt := range []struct {
		why     string
		prompts []string
		want    []string // one less than prompts: the last is an error
	}{
		{"the usual prompts", []string{"Username:", "Password:"}, []string{"ann", "s3cret"}},
		{"other words", []string{"User Name\x00", "Password\x00"}, []string{"ann", "s3cret"}},
		{"empty prompts", []string{"", ""}, []string{"ann", "s3cret"}},
		{"another language", []string{"Benutzer:", "Kennwort:"}, []string{"ann", "s3cret"}},
		{"the password is asked for first", []string{"Password:"}, []string{"s3cret"}},
		{"in lower case", []string{"password"}, []string{"s3cret"}},
		{"a third prompt has no response", []string{"Username:", "Password:", "Realm:"}, []string{"ann", "s3cret"}},
		{"nor has a prompt after the password", []string{"Username:", "Password:", "Password:"}, []string{"ann", "s3cret"}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			l := &loginClient{username: "ann", password: newSecret("s3cret")}
			mechanism, ir, err := l.Start()
			if mechanism != "LOGIN" || ir != nil || err != nil {
				t.Errorf("Start: got %q, %q, %v, want LOGIN and no initial response", mechanism, ir, err)
			}
			for i, prompt := range tt.prompts {
				got, err := l.Next([]byte(prompt))
				if i < len(tt.want) {
					if string(got) != tt.want[i] || err != nil {
						t.Errorf("%q: got %q, %v, want %q", prompt, got, err, tt.want[i])
					}
				} else if got != nil || !errors.Is(err, sasl.ErrUnexpectedServerChallenge) {
					t.Errorf("%q: got %q, %v, want ErrUnexpectedServerChallenge", prompt, got, err)
				}
			}
			if got := fmt.Sprintf("%v %+v %#v", l, l, l); strings.Contains(got, "s3cret") {
				t.Errorf("printed as %s", got)
			}
		})
	}
}

func TestMalformedReplyToAuthIsNotQuoted(t *testing.T) {
	// Such a relay echoes its input, like the echo service. A key in base64 may be cut there.
	key := "s3cret" + strings.Repeat("-key", 30)
	for _, tt := range []struct{ why, offer string }{
		{"PLAIN, alone", "250-relay\r\n250 AUTH PLAIN\r\n"},
		{"PLAIN, pipelined with the first transaction", "250-relay\r\n250-PIPELINING\r\n250 AUTH PLAIN\r\n"},
		{"LOGIN", "250-relay\r\n250 AUTH LOGIN\r\n"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				echo := func(conn net.Conn) { // ends when the client closes
					defer conn.Close()
					io.WriteString(conn, "220 relay\r\n")
					for in := bufio.NewReader(conn); ; {
						line, err := in.ReadString('\n')
						switch {
						case err != nil:
							return
						case strings.HasPrefix(line, "EHLO"):
							line = tt.offer
						case strings.HasPrefix(line, "AUTH LOGIN"), line == "YW5u\r\n":
							line = "334 \r\n"
						}
						io.WriteString(conn, line)
					}
				}
				client, err := New(Config{
					Addr: "relay.example:25", TLS: TLSNone, AllowInsecureAuth: true, Username: "ann", Password: key, Retry: Retry{MaxAttempts: 1},
					Dial: func(context.Context, string, string) (net.Conn, error) {
						c, s := netpipe.New(0)
						go echo(s)
						return c, nil
					},
				})
				if err != nil {
					t.Fatal(err)
				}
				defer client.Close()
				_, err = client.Send(t.Context(), Message{From: "a@x.example", To: []string{"b@y.example"}, Body: Bytes([]byte("x"))})
				e, ok := errors.AsType[*Error](err)
				if !ok || e.Op != OpAuth || !errors.Is(err, wire.ErrMalformed) || OutcomeOf(err) != NotAccepted {
					t.Errorf("got %v, want a malformed reply to AUTH", err)
				}
				for _, piece := range []string{"s3cret", "czNjcmV0", "AGFubgBzM2NyZXQ"} {
					if strings.Contains(fmt.Sprint(err), piece) {
						t.Errorf("got %v, which contains the key", err)
					}
				}
			})
		})
	}
}

// The advice in an error when a connection could not be opened, or the relay requires authentication. Dialogues are tested by the
// scripts of internal/test/dialogue.

// checkAdvice checks that text contains each of says, and none of not.
func checkAdvice(t *testing.T, why, text string, says, not []string) {
	t.Helper()
	for _, words := range says {
		if !strings.Contains(text, words) {
			t.Errorf("%s: got %q, which does not contain %q", why, text, words)
		}
	}
	for _, words := range not {
		if strings.Contains(text, words) {
			t.Errorf("%s: got %q, which contains %q", why, text, words)
		}
	}
}

func mustCheck(t *testing.T, cfg Config) *settings {
	t.Helper()
	s, err := cfg.check()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestRefusedAuthIsExplainedByItsCode(t *testing.T) {
	relay := Config{Addr: "relay.example:587", Username: "ann", Password: "s3cret"}
	sendGrid := Config{Password: "SG.s3cret"}
	for _, tt := range []struct {
		why  string
		cfg  Config
		code int
		says []string
	}{
		{"wrong credentials", relay, 535, []string{"535", "; check Username and Password"}},
		{"wrong credentials at SendGrid", sendGrid, 535, []string{"apikey", "API key"}},
		{"an unknown command", relay, 502, []string{"mechanism", "Config.Auth"}},
		{"a mechanism that is not accepted", relay, 504, []string{"mechanism", "Config.Auth"}},
		{"out of order", relay, 503, []string{"out of order"}},
		{"no TLS", relay, 530, []string{"TLS"}},
		{"encryption required", relay, 538, []string{"TLS"}},
		{"too weak", relay, 534, []string{"app password", "OAuth"}},
		{"temporary refusal", relay, 454, []string{"temporary"}},
		{"whatever it is", relay, 550, nil},
		{"a syntax error", relay, 501, nil},
	} {
		e := mustCheck(t, tt.cfg).refusedAuth(wire.Reply{Code: tt.code, Text: "no"})
		not := []string{"Username"}
		switch {
		case tt.code != 535:
		case tt.cfg.Addr == "":
			not = nil
		default:
			not = []string{"apikey", "SendGrid"}
		}
		checkAdvice(t, tt.why, e.Error(), tt.says, not)
		if tt.says == nil && e.Err != nil {
			t.Errorf("%s: got %v, want no advice", tt.why, e)
		}
	}
	own := mustCheck(t, Config{Auth: func(context.Context, ServerInfo) (Mechanism, error) { return nil, nil }})
	checkAdvice(t, "Config.Auth", own.refusedAuth(wire.Reply{Code: 535}).Error(), []string{"what Config.Auth returns"}, []string{"Username", "apikey"})
	checkAdvice(t, "Config.Auth", own.refusedAuth(wire.Reply{Code: 504}).Error(), []string{"let Config.Auth choose another"}, nil)
}

func TestRefusalForLackOfCredentialsOrTLSSaysSo(t *testing.T) {
	const credentials, secure = "no credentials were given", "wants TLS"
	none := Config{Addr: "relay.example:587"}
	known := Config{Addr: "relay.example:587", Username: "ann", Password: "s3cret"}
	auth := &wire.Extensions{Keywords: []string{"AUTH", "STARTTLS"}, Auth: []string{"PLAIN"}}
	for _, tt := range []struct {
		why   string
		cfg   Config
		ext   *wire.Extensions
		clear bool
		op    Op
		r     Reply
		says  string // "": no advice
	}{
		{"530 to MAIL", none, auth, false, OpMail, Reply{Code: 530, Message: "Authentication required"}, credentials},
		{"554 to RCPT", none, auth, false, OpRcpt, Reply{Code: 554, Message: "Relay access denied"}, credentials},
		{"530 to RCPT", none, auth, false, OpRcpt, Reply{Code: 530}, credentials},
		{"550 to RCPT, by its text", none, auth, false, OpRcpt, Reply{Code: 550, Message: "relaying denied"}, credentials},
		{"SendGrid's words", none, auth, false, OpMail, Reply{Code: 550, Message: "Unauthenticated senders not allowed"}, credentials},
		{"a refused recipient", none, auth, false, OpRcpt, Reply{Code: 550, Message: "no such user"}, ""},
		{"temporary refusal", none, auth, false, OpRcpt, Reply{Code: 450, Message: "authentication down"}, ""},
		{"credentials were given", known, auth, false, OpMail, Reply{Code: 530, Message: "Authentication required"}, ""},
		{"AUTH is not offered", none, &wire.Extensions{}, false, OpMail, Reply{Code: 530}, ""},
		{"TLS is required", none, auth, true, OpMail, Reply{Code: 530, Message: "Must issue a STARTTLS command first"}, secure},
		{"TLS is required before AUTH", none, &wire.Extensions{Keywords: []string{"STARTTLS"}}, true, OpMail, Reply{Code: 530}, secure},
		{"TLS is active", none, auth, false, OpMail, Reply{Code: 530, Message: "Must issue a STARTTLS command first"}, credentials},
		{"the message is refused", none, auth, false, OpEnd, Reply{Code: 554, Message: "authentication results"}, ""},
	} {
		e := &Error{Op: tt.op, Reply: tt.r, Outcome: NotAccepted}
		mustCheck(t, tt.cfg).explainRefusal(e, tt.ext, tt.clear)
		switch {
		case tt.says == "" && e.Err != nil:
			t.Errorf("%s: got %v, want no advice", tt.why, e)
		case tt.says != "":
			checkAdvice(t, tt.why, e.Error(), []string{"; ", tt.says}, nil)
		}
	}
}

func TestPasswordInPlaintextSaysThatTLSIsOffered(t *testing.T) {
	c := mustCheck(t, Config{Addr: "relay.example:25", TLS: TLSNone, Username: "ann", Password: "s3cret"})
	_, err := c.mechanism(t.Context(), &wire.Extensions{Keywords: []string{"STARTTLS"}}, nil)
	e := c.explain(t.Context(), err.(*conn.OpenError))
	checkAdvice(t, "STARTTLS is offered", e.Error(), []string{"offers STARTTLS", "smtp://"}, nil)
	_, err = c.mechanism(t.Context(), &wire.Extensions{}, nil)
	e = c.explain(t.Context(), err.(*conn.OpenError))
	checkAdvice(t, "nothing is offered", e.Error(), []string{"does not offer AUTH"}, []string{"STARTTLS"})
}

func TestGreetingOfSomethingElseIsPermanent(t *testing.T) {
	for _, line := range []string{"* OK IMAP4rev1 ready", "+OK POP3 ready", "SSH-2.0-OpenSSH_9.2", "HTTP/1.1 400 Bad Request", "\x15\x03\x01\x00\x02\x02\x46", "\x4a\x00\x00\x00"} {
		c := mustCheck(t, Config{Addr: "relay.example:25", TLS: TLSNone})
		e := c.explain(t.Context(), &conn.OpenError{Step: conn.StepGreeting, Err: &wire.MalformedError{Line: line}})
		checkAdvice(t, line, e.Error(), []string{"this is not an SMTP server; check the port"}, nil)
		if !e.lasting() || e.Outcome != NotAccepted {
			t.Errorf("%q: lasting %v, %v, want an error at once, not accepted", line, e.lasting(), e.Outcome)
		}

		// The same over implicit TLS: these are not replies either.
		var header tls.RecordHeaderError
		copy(header.RecordHeader[:], line)
		c = mustCheck(t, Config{Addr: "relay.example:465"})
		e = c.explain(t.Context(), &conn.OpenError{Step: conn.StepTLS, Err: header})
		checkAdvice(t, line, e.Error(), []string{"this is not an SMTP server; check the port"}, []string{"TLSStartTLS"})
	}
}

// certificate returns a certificate made from template, signed by parent; nil means self-signed.
func certificate(t *testing.T, template, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber, template.NotAfter = big.NewInt(1), time.Now().Add(time.Hour)
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// handshake returns the error of a client that connects to a server with config: of its handshake, or of the first read after it.
func handshake(t *testing.T, client, server *tls.Config) error {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		nc, err := l.Accept()
		if err != nil {
			return
		}
		defer nc.Close()
		s := tls.Server(nc, server)
		s.Handshake()
		s.Read(make([]byte, 1))
	}()
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	c := tls.Client(nc, client)
	if err := c.Handshake(); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 1))
	return err
}

func TestTLSErrorsNameTheRemedy(t *testing.T) {
	names := []string{"relay.example"}
	own, ownKey := certificate(t, &x509.Certificate{Subject: pkix.Name{CommonName: "relay.example"}, DNSNames: names}, nil, nil)
	common, commonKey := certificate(t, &x509.Certificate{Subject: pkix.Name{CommonName: "relay.example"}}, nil, nil)
	ca, caKey := certificate(t, &x509.Certificate{Subject: pkix.Name{CommonName: "Example \x1b CA"}, IsCA: true, BasicConstraintsValid: true}, nil, nil)
	issued, issuedKey := certificate(t, &x509.Certificate{Subject: pkix.Name{CommonName: "x"}, DNSNames: names}, ca, caKey)
	pair := func(cert *x509.Certificate, key *ecdsa.PrivateKey) []tls.Certificate {
		return []tls.Certificate{{Certificate: [][]byte{cert.Raw}, PrivateKey: key}}
	}
	self, selfKey := certificate(t, &x509.Certificate{DNSNames: append(names, "localhost")}, nil, nil)
	roots := x509.NewCertPool()
	roots.AddCert(own)
	roots.AddCert(common)

	for _, tt := range []struct {
		why    string
		addr   string
		server *tls.Config
		says   []string
		not    []string
	}{
		{"no version in common, alert 70", "relay.example:465", &tls.Config{Certificates: pair(own, ownKey), MaxVersion: tls.VersionTLS11}, []string{"no version"}, nil},
		{"no cipher suite in common, alert 40", "relay.example:465", &tls.Config{Certificates: pair(own, ownKey), MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_RSA_WITH_RC4_128_SHA}},
			[]string{"no version or cipher suite in common", "TLSConfig.Certificates"}, nil},
		{"a client certificate is required, alert 116", "relay.example:465", &tls.Config{Certificates: pair(own, ownKey), ClientAuth: tls.RequireAnyClientCert},
			[]string{"wants a client certificate (TLSConfig.Certificates)"}, nil},
		{"the same with TLS 1.2, alert 42 or 40", "relay.example:465", &tls.Config{Certificates: pair(own, ownKey), ClientAuth: tls.RequireAnyClientCert, MaxVersion: tls.VersionTLS12},
			[]string{"TLSConfig.Certificates"}, nil},
		{"only a common name", "relay.example:465", &tls.Config{Certificates: pair(common, commonKey)}, []string{"no subject alternative name", "no TLSConfig.ServerName can match"}, []string{"set TLSConfig.ServerName"}},
		{"another name", "other.example:465", &tls.Config{Certificates: pair(own, ownKey)}, []string{`not for "other.example"`, "somebody else may be answering"}, []string{"InsecureSkipVerify", "TLSNone"}},
		{"an unknown authority", "relay.example:465", &tls.Config{Certificates: pair(issued, issuedKey)}, []string{`Example \x1b CA`, "put its authority into TLSConfig.RootCAs", "somebody else is answering"}, []string{"TLSNone", "\x1b"}},
		{"self-signed", "relay.example:465", &tls.Config{Certificates: pair(self, selfKey)}, []string{"self-signed", "put it into TLSConfig.RootCAs"}, []string{"TLSNone"}},
		{"self-signed on this machine", "localhost:587", &tls.Config{Certificates: pair(self, selfKey)}, []string{"self-signed", "TLSNone"}, nil},
		{"another name on this machine", "127.0.0.1:587", &tls.Config{Certificates: pair(own, ownKey)}, []string{`not for "127.0.0.1"`, "TLSNone"}, nil},
	} {
		t.Run(tt.why, func(t *testing.T) {
			c := mustCheck(t, Config{Addr: tt.addr, TLSConfig: &tls.Config{RootCAs: roots}})
			err := handshake(t, c.tls, tt.server)
			if err == nil {
				t.Fatal("got no error")
			}
			for _, step := range []conn.Step{conn.StepTLS, conn.StepEHLO} { // with TLS 1.3 some errors come after the handshake
				if step == conn.StepEHLO && alertText(err) == "" {
					continue
				}
				e := c.explain(t.Context(), &conn.OpenError{Step: step, Err: err})
				checkAdvice(t, string(step), e.Error(), tt.says, tt.not)
				if !e.lasting() || !errors.Is(e, err) {
					t.Errorf("%v: lasting %v, want an error at once, with its cause", e, e.lasting())
				}
			}
		})
	}
}

func TestSilenceOfAPipelinedGroupNamesPipelining(t *testing.T) {
	ext := &wire.Extensions{Keywords: []string{"PIPELINING"}}
	silent := func(op Op) *Error {
		return &Error{Op: op, Outcome: NotAccepted, Err: &conn.TimeoutError{Step: conn.Step(op), After: time.Minute}}
	}
	for _, tt := range []struct {
		why  string
		mode Pipelining
		ext  *wire.Extensions
		e    *Error
		says bool
	}{
		{"MAIL", PipelineAuto, ext, silent(OpMail), true},
		{"DATA", PipelineWithin, ext, silent(OpData), true},
		{"it is off", PipelineOff, ext, silent(OpMail), false},
		{"it is not offered", PipelineAuto, &wire.Extensions{}, silent(OpMail), false},
		{"the greeting", PipelineAuto, ext, silent(OpGreeting), false},
		{"the connection was lost", PipelineAuto, ext, &Error{Op: OpMail, Outcome: NotAccepted, Err: net.ErrClosed}, false},
	} {
		mustCheck(t, Config{Addr: "relay.example:25", Pipelining: tt.mode}).explainSilence(tt.e, tt.ext)
		if got := strings.Contains(tt.e.Error(), "Config.Pipelining"); got != tt.says {
			t.Errorf("%s: got %q, names Config.Pipelining %v, want %v", tt.why, tt.e, got, tt.says)
		}
	}
}
