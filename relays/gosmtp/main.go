// Command gosmtp is go-smtp's server as a relay: with limits, and a line in a file for each message.
//
// It is built with several versions of go-smtp, so it uses only what all of them have.
package main

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"
)

type settings struct {
	Plain, StartTLS, Implicit           int // ports
	MaxRecipients, MaxSize, IdleSeconds int
	User, Password, Cert, Key, Record   string
}

// ledger writes one line for each message before its final reply.
type ledger struct {
	mu  sync.Mutex
	out *json.Encoder
}

type record struct {
	From string   `json:"from"`
	To   []string `json:"to"`
	Data []byte   `json:"data"`
}

func (l *ledger) add(r record) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.out.Encode(r)
}

// session is one connection, used by one goroutine.
type session struct {
	settings
	*ledger
	needAuth, authenticated bool
	record                  record
}

func (s *session) Reset()        { s.record = record{} }
func (s *session) Logout() error { return nil }

func (s *session) AuthMechanisms() []string {
	if !s.needAuth {
		return nil
	}
	return []string{sasl.Plain}
}

func (s *session) Auth(string) (sasl.Server, error) {
	return sasl.NewPlainServer(func(_, user, password string) error {
		if user != s.User || password != s.Password {
			return smtp.ErrAuthFailed
		}
		s.authenticated = true
		return nil
	}), nil
}

func (s *session) Mail(from string, _ *smtp.MailOptions) error {
	switch {
	case s.needAuth && !s.authenticated:
		return &smtp.SMTPError{Code: 530, EnhancedCode: smtp.EnhancedCode{5, 7, 0}, Message: "authentication required"}
	case strings.HasPrefix(from, "refused@"):
		return &smtp.SMTPError{Code: 550, EnhancedCode: smtp.EnhancedCode{5, 7, 1}, Message: "sender refused"}
	}
	s.record.From = from
	return nil
}

func (s *session) Rcpt(to string, _ *smtp.RcptOptions) error {
	switch {
	case strings.HasPrefix(to, "refused"):
		return &smtp.SMTPError{Code: 550, EnhancedCode: smtp.EnhancedCode{5, 1, 1}, Message: "no such user"}
	case strings.HasPrefix(to, "busy"):
		return &smtp.SMTPError{Code: 450, EnhancedCode: smtp.EnhancedCode{4, 2, 1}, Message: "mailbox busy"}
	}
	s.record.To = append(s.record.To, to)
	return nil
}

func (s *session) Data(r io.Reader) error {
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	s.record.Data = b
	return s.add(s.record)
}

func main() {
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

func run() error {
	var set settings
	b, err := os.ReadFile("/etc/relay/settings.json")
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, &set); err != nil {
		return err
	}
	file, err := os.OpenFile(set.Record, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	queue := &ledger{out: json.NewEncoder(file)}
	pair, err := tls.LoadX509KeyPair(set.Cert, set.Key)
	if err != nil {
		return err
	}
	config := &tls.Config{Certificates: []tls.Certificate{pair}}

	ended := make(chan error)
	for _, port := range []int{set.Plain, set.StartTLS, set.Implicit} {
		inClear := port == set.Plain
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			return err
		}
		s := smtp.NewServer(smtp.BackendFunc(func(*smtp.Conn) (smtp.Session, error) {
			return &session{settings: set, ledger: queue, needAuth: !inClear}, nil
		}))
		s.Domain = "relay.example"
		s.MaxRecipients = set.MaxRecipients
		s.MaxMessageBytes = int64(set.MaxSize)
		s.ReadTimeout = time.Duration(set.IdleSeconds) * time.Second
		s.EnableSMTPUTF8 = true
		if !inClear {
			s.TLSConfig = config
		}
		if port == set.Implicit {
			l = tls.NewListener(l, config)
		}
		go func() { ended <- s.Serve(l) }() // ends when the relay is killed
	}
	return errors.Join(errors.New("a listener has ended"), <-ended)
}
