package smtptest

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtprelay/smtprelay"
)

func TestImplicitTLS(t *testing.T) {
	s := NewUnstartedServer()
	s.InMemory = true
	synctest.Test(t, func(t *testing.T) {
		s.StartTLS()
		t.Cleanup(s.Close)
		if cfg := s.Config(); cfg.TLS != smtprelay.TLSImplicit || !strings.HasPrefix(s.URL(), "smtps://apikey:") || !strings.HasSuffix(cfg.Addr, ":465") {
			t.Errorf("%v, %v", cfg, s.URL())
		}
		r := dial(t, s)
		r.tls(clientTLS(s))
		r.want("220 ")
		r.say("EHLO client.test")
		reply, err := r.reply()
		if err != nil || strings.Contains(reply, "STARTTLS") || !strings.Contains(reply, "AUTH PLAIN") {
			t.Errorf("%q, %v", reply, err)
		}
		r.say("STARTTLS", "AUTH PLAIN "+plain(s))
		r.want("502 ", "235 ")
		r.send("a@x.example", "b@y.example", "text")
		r.say("QUIT")
		r.want("221 ")
		r.closed()
	})
}

func TestCertificates(t *testing.T) {
	handshake := func(t *testing.T, s *Server, cfg *tls.Config) error {
		var err error
		bubble(t, s, func(t *testing.T) {
			r := dial(t, s)
			r.want("220 ")
			r.say("STARTTLS")
			r.want("220 ")
			err = tls.Client(r.Conn, cfg).Handshake()
		})
		return err
	}
	t.Run("good", func(t *testing.T) {
		s := NewUnstartedServer()
		bubble(t, s, func(t *testing.T) {
			for _, name := range []string{"127.0.0.1", "localhost", "smtp.test"} {
				if _, err := s.Certificate().Verify(x509.VerifyOptions{Roots: s.Roots(), DNSName: name, CurrentTime: time.Now()}); err != nil {
					t.Error(err)
				}
			}
		})
	})
	t.Run("self-signed", func(t *testing.T) {
		err := handshake(t, NewUnstartedServer(), &tls.Config{ServerName: "localhost"})
		if _, ok := errors.AsType[*tls.CertificateVerificationError](err); !ok {
			t.Errorf("got %v", err)
		}
	})
	t.Run("another name", func(t *testing.T) {
		s := NewUnstartedServer()
		s.CertNames = []string{"other.example"}
		bubble(t, s, func(t *testing.T) {
			r := dial(t, s)
			r.want("220 ")
			r.say("STARTTLS")
			r.want("220 ")
			err := tls.Client(r.Conn, clientTLS(s)).Handshake()
			if _, ok := errors.AsType[x509.HostnameError](err); !ok {
				t.Errorf("got %v", err)
			}
		})
	})
	t.Run("expired", func(t *testing.T) {
		s := NewUnstartedServer()
		s.CertNotAfter = time.Date(1999, 12, 31, 0, 0, 0, 0, time.UTC) // the day before the bubble's clock starts
		bubble(t, s, func(t *testing.T) {
			r := dial(t, s)
			r.want("220 ")
			r.say("STARTTLS")
			r.want("220 ")
			err := tls.Client(r.Conn, clientTLS(s)).Handshake()
			if e, ok := errors.AsType[x509.CertificateInvalidError](err); !ok || e.Reason != x509.Expired {
				t.Errorf("got %v", err)
			}
		})
	})
	t.Run("a custom configuration", func(t *testing.T) {
		mine, err := newCertificate([]string{"mine.example"}, time.Time{})
		if err != nil {
			t.Fatal(err)
		}
		s := NewUnstartedServer()
		s.TLS = &tls.Config{Certificates: []tls.Certificate{mine}, MaxVersion: tls.VersionTLS12}
		bubble(t, s, func(t *testing.T) {
			r := dial(t, s)
			r.want("220 ")
			r.say("STARTTLS")
			r.want("220 ")
			tc := tls.Client(r.Conn, &tls.Config{RootCAs: s.Roots(), ServerName: "mine.example"})
			if err := tc.Handshake(); err != nil || tc.ConnectionState().Version != tls.VersionTLS12 {
				t.Errorf("%v, version %x", err, tc.ConnectionState().Version)
			}
		})
	})
}

func TestResumedSessionsAreCounted(t *testing.T) {
	s := NewUnstartedServer()
	bubble(t, s, func(t *testing.T) {
		cfg := clientTLS(s)
		cfg.ClientSessionCache = tls.NewLRUClientSessionCache(1)
		for i := range 2 {
			r := dial(t, s)
			r.want("220 ")
			r.say("STARTTLS")
			r.want("220 ")
			r.tls(cfg)
			r.say("QUIT")
			r.want("221 ") // reading it also reads the session ticket
			r.closed()
			if st := s.Conns()[i]; !st.TLS || st.TLSResumed != (i == 1) {
				t.Errorf("%+v", st)
			}
		}
	})
}

func TestStartTLSForgets(t *testing.T) {
	s := NewUnstartedServer()
	s.NoAuth = true
	bubble(t, s, func(t *testing.T) {
		r := dial(t, s)
		r.want("220 ")
		r.say("EHLO client.test")
		r.want("250-")
		r.say("MAIL FROM:<a@x.example>")
		r.want("250 ")
		r.say("STARTTLS", "RSET") // injected before the handshake
		r.want("220 ")
		r.tls(clientTLS(s))
		r.silent()
		r.say("RCPT TO:<b@y.example>")
		r.want("502 ")
		r.say("MAIL FROM:<a@x.example>") // before EHLO
		r.want("502 ")
		r.say("EHLO client.test")
		if reply, err := r.reply(); err != nil || strings.Contains(reply, "STARTTLS") {
			t.Errorf("%q, %v", reply, err)
		}
		r.send("a@x.example", "b@y.example", "text")
	})
}

func TestAuth(t *testing.T) {
	b64 := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	clear := func() *Server {
		s := NewUnstartedServer()
		s.NoTLS = true
		return s
	}
	hello := func(t *testing.T, s *Server) *raw {
		r := dial(t, s)
		r.want("220 ")
		r.say("EHLO client.test")
		r.want("250-")
		return r
	}
	t.Run("not before STARTTLS", func(t *testing.T) {
		s := NewUnstartedServer()
		bubble(t, s, func(t *testing.T) {
			r := hello(t, s)
			r.say("AUTH PLAIN " + plain(s))
			r.want("530 5.7.0")
		})
	})
	t.Run("PLAIN in two steps", func(t *testing.T) {
		s := clear()
		bubble(t, s, func(t *testing.T) {
			r := hello(t, s)
			r.say("AUTH PLAIN")
			r.want("334 ")
			r.say(plain(s))
			r.want("235 ")
			r.say("AUTH PLAIN " + plain(s))
			r.want("503 ")
		})
	})
	t.Run("LOGIN", func(t *testing.T) {
		s := clear()
		s.Username, s.Password = "me", "secret"
		bubble(t, s, func(t *testing.T) {
			r := hello(t, s)
			r.say("AUTH LOGIN")
			r.want("334 VXNlcm5hbWU6")
			r.say(b64("me"))
			r.want("334 UGFzc3dvcmQ6")
			r.say(b64("wrong"))
			r.want("535 ")
			r.say("AUTH LOGIN " + b64("me"))
			r.want("334 UGFzc3dvcmQ6")
			r.say("*")
			r.want("501 ")
			r.say("AUTH LOGIN " + b64("me"))
			r.want("334 UGFzc3dvcmQ6")
			r.say(b64("secret"))
			r.want("235 ")
			if s.Stats().Auths != 3 || !s.Conns()[0].Authenticated {
				t.Errorf("%+v", s.Conns()[0])
			}
		})
	})
	t.Run("wrong password, and an envelope in the same write", func(t *testing.T) {
		s := clear()
		bubble(t, s, func(t *testing.T) {
			r := hello(t, s)
			r.say("AUTH PLAIN "+b64("\x00apikey\x00wrong"), "MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>", "DATA")
			r.want("535 5.7.8", "550 Unauthenticated senders not allowed", "502 ", "502 ")
			if s.Conns()[0].Authenticated {
				t.Error("authenticated")
			}
		})
	})
	t.Run("a mechanism that is not offered", func(t *testing.T) {
		s := clear()
		s.Mechanisms = []string{"LOGIN"}
		bubble(t, s, func(t *testing.T) {
			r := hello(t, s)
			r.say("AUTH PLAIN " + plain(s))
			r.want("504 ")
		})
	})
	t.Run("not at all", func(t *testing.T) {
		s := plainRelay()
		bubble(t, s, func(t *testing.T) {
			r := hello(t, s)
			r.say("AUTH PLAIN " + plain(s))
			r.want("502 ")
			r.send("", "b@y.example", "text")
			if strings.Contains(s.URL(), "@") || s.Config().Password != "" {
				t.Errorf("credentials in %v", s.URL())
			}
		})
	})
	t.Run("a custom mechanism", func(t *testing.T) {
		s := clear()
		s.Mechanisms = []string{"XTOKEN"}
		s.SASL = func(mechanism string) (SASLServer, error) {
			return &loginServer{check: func(user, token string) error {
				if mechanism != "XTOKEN" || user != "me" || token != "t" {
					return errors.New("no")
				}
				return nil
			}}, nil
		}
		bubble(t, s, func(t *testing.T) {
			r := hello(t, s)
			r.say("AUTH XTOKEN "+b64("me"), b64("x"), "AUTH xtoken "+b64("me"), b64("t"))
			r.want("334 ", "454 ", "334 ", "235 ")
		})
	})
}

func TestTranscriptHasNoSecret(t *testing.T) {
	var log strings.Builder
	s := NewUnstartedServer()
	s.NoTLS = true
	s.Log = &log
	bubble(t, s, func(t *testing.T) {
		s.Fault(Fault{At: Noop, Reply: "250-one\n250 two"})
		r := dial(t, s)
		r.want("220 ")
		r.say("EHLO client.test")
		r.want("250-")
		r.say("AUTH PLAIN "+base64.StdEncoding.EncodeToString([]byte("\x00apikey\x00wrong")), "AUTH LOGIN",
			base64.StdEncoding.EncodeToString([]byte(s.Username)), base64.StdEncoding.EncodeToString([]byte(s.Password)), "NOOP")
		r.want("535 ", "334 ", "334 ", "235 ", "250-")
		r.send("a@x.example", "b@y.example", "body text")
		r.say("QUIT")
		r.want("221 ")
		r.closed()
	})
	want := `--1: opened by client
S1: 220 SG ESMTP service ready at smtp.test
C1: EHLO client.test
S1: 250-smtp.test
S1: 250-8BITMIME
S1: 250-PIPELINING
S1: 250-SIZE 31457280
S1: 250-AUTH PLAIN LOGIN
S1: 250 AUTH=PLAIN LOGIN
C1: AUTH PLAIN [redacted]
S1: 535 5.7.8 Authentication failed
C1: AUTH LOGIN
S1: 334 VXNlcm5hbWU6
C1: [redacted]
S1: 334 UGFzc3dvcmQ6
C1: [redacted]
S1: 235 Authentication successful
C1: NOOP
--1: fault at NOOP
S1: 250-one
S1: 250 two
C1: MAIL FROM:<a@x.example>
S1: 250 Sender address accepted
C1: RCPT TO:<b@y.example>
S1: 250 Recipient address accepted
C1: DATA
S1: 354 Continue
C1: .
S1: 250 Ok: queued as ` + s.Messages()[0].ID + `
C1: QUIT
S1: 221 See you later
--1: closed
`
	if log.String() != want {
		t.Errorf("got\n%s\nwant\n%s", &log, want)
	}
}
