// Package devrelay is the relay of "smtprelay serve": package smtptest's fake relay with a web page and an HTTP API beside it,
// which show what was said and what has arrived, and switch faults on and off while it runs.
//
//	relay.go      what is started and ended together
//	mails.go      the messages that are kept, searched and waited for
//	dialogue.go   what is said on each connection
//	faults.go     faults: their text, their JSON, which of them are on
//	mime.go       what is in a message
//	htmlmail.go   HTML mail, which is hostile
//	api.go        the HTTP API
//	page/         the page
//
// Package guard says who may use them.
package devrelay

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"syscall"
	"time"

	"github.com/smtprelay/smtprelay/cmd/smtprelay/internal/guard"
	"github.com/smtprelay/smtprelay/smtptest"
)

// Config says what a Relay is to be like. Check tells what is wrong with it; Start relies on that.
type Config struct {
	Listen string // the address of SMTP, "host:port"
	HTTP   string // the address of the page and of the API
	Token  string // what users of the page and the API must know; "" is none on loopback, and a random one elsewhere

	Name               string // of the relay, in the greeting and in its certificate
	Username, Password string // what AUTH must give; without Username AUTH is not offered
	TLS                string // "none", "starttls" or "implicit"
	CertFile           string // where the certificate is written; "" is a temporary file, if one can be written

	MaxConns, MaxMessages, MaxRecipients int   // at once; on a connection; of a message. At least 1
	MaxSize                              int64 // of a message, in octets. At least 1
	Rate                                 float64
	Delay                                time.Duration // a round trip
	Chunking                             bool
	Faults                               []FaultSpec

	Keep      int   // messages at most
	KeepBytes int64 // octets of messages at most, all together
}

// Check returns all mistakes, joined.
func (c *Config) Check() error {
	var errs []error
	wrong := func(is bool, format string, args ...any) {
		if is {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	for _, at := range []struct{ flag, addr string }{{"--listen", c.Listen}, {"--http", c.HTTP}} {
		_, _, err := net.SplitHostPort(at.addr)
		wrong(err != nil, "%s %q: want HOST:PORT, such as 127.0.0.1:2525", at.flag, at.addr)
	}
	wrong(c.TLS != "none" && c.TLS != "starttls" && c.TLS != "implicit", "--tls %q: want none, starttls or implicit", c.TLS)
	wrong(c.CertFile != "" && c.TLS == "none", "--cert-file needs --tls starttls or --tls implicit")
	wrong(c.Username == "" && c.Password != "", "--password-file needs --user")
	errs = append(errs, guard.CheckToken(c.Token))
	wrong(c.MaxConns < 1 || c.MaxConns > 10_000, "--max-conns %d: want 1 to 10000", c.MaxConns)
	wrong(c.MaxMessages < 1, "--max-messages %d: want 1 or more", c.MaxMessages)
	wrong(c.MaxRecipients < 1, "--max-recipients %d: want 1 or more", c.MaxRecipients)
	wrong(c.MaxSize < 1, "--max-size %d: want 1 or more octets", c.MaxSize)
	wrong(!(c.Rate >= 0 && c.Rate <= 1e6), "--rate %v: want 0 to 1000000 messages a second", c.Rate)
	wrong(c.Delay < 0 || c.Delay > time.Minute, "--delay %v: want 0 to 1m", c.Delay)
	wrong(c.Keep < 1, "--keep %d: want 1 or more", c.Keep)
	wrong(c.KeepBytes < 1, "--keep-bytes %d: want 1 or more", c.KeepBytes)
	for _, f := range c.Faults {
		if err := f.check(); err != nil {
			errs = append(errs, fmt.Errorf("--fault %q: %w", f.String(), err))
		}
	}
	return errors.Join(errs...)
}

// Relay is a relay that runs. Its methods are safe for concurrent use.
type Relay struct {
	cfg       Config
	smtp      *smtptest.Server
	mails     *mailbox
	dialogues *dialogues
	faults    *faultSet
	changed   bell

	guard    *guard.Guard
	web      *http.Server
	webAddr  *net.TCPAddr
	webEnded chan struct{} // closed when web has stopped serving
	stopWeb  context.CancelFunc
	certFile string // "" if there is none
	certTemp bool   // certFile is removed at the end
}

// Start starts a relay. An error is about an address that cannot be listened on, or a file that cannot be written.
func Start(cfg Config) (*Relay, error) {
	smtpListener, err := listenTCP(cfg.Listen)
	if err != nil {
		return nil, err
	}
	webListener, err := listenTCP(cfg.HTTP)
	if err != nil {
		smtpListener.Close()
		return nil, err
	}
	r := &Relay{cfg: cfg, webAddr: webListener.Addr().(*net.TCPAddr), webEnded: make(chan struct{})}
	r.mails = newMailbox(cfg.Keep, cfg.KeepBytes, r.changed.ring)
	r.dialogues = newDialogues(r.changed.ring)
	r.startSMTP(smtpListener)
	if err := r.writeCertificate(); err != nil {
		r.smtp.Close()
		webListener.Close()
		return nil, err
	}
	r.startWeb(webListener)
	return r, nil
}

func listenTCP(addr string) (*net.TCPListener, error) {
	l, err := net.Listen("tcp", addr)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("%s is in use by another program: choose another port with --listen (SMTP) or --http (the page)", addr)
	}
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

func (r *Relay) startSMTP(l *net.TCPListener) {
	cfg := &r.cfg
	s := smtptest.NewUnstartedServer()
	s.Listener = l
	s.Name = cfg.Name
	s.NoAuth = cfg.Username == ""
	s.Username, s.Password = cfg.Username, cfg.Password
	s.NoTLS = cfg.TLS == "none"
	s.CertNames = certNames(cfg.Name, l.Addr().(*net.TCPAddr))
	s.MaxConns, s.MaxMessages, s.MaxRecipients, s.MaxSize = cfg.MaxConns, cfg.MaxMessages, cfg.MaxRecipients, cfg.MaxSize
	s.Delay, s.Chunking = cfg.Delay, cfg.Chunking
	s.Keep = -1 // what is kept is kept here
	s.OnMessage = func(m smtptest.Message) {
		r.mails.add(m)
		r.dialogues.arrived(m)
	}
	s.OnLine = func(l smtptest.Line) { r.dialogues.line(l) }
	r.smtp = s
	r.faults = newFaultSet(s, r.changed.ring)
	if cfg.Rate > 0 {
		r.faults.add(FaultSpec{At: "dot", Rate: cfg.Rate, Reply: "454 4.7.0 Throttling failure: maximum sending rate exceeded"})
	}
	for _, f := range cfg.Faults {
		r.faults.add(f)
	}
	if cfg.TLS == "implicit" {
		s.StartTLS()
	} else {
		s.Start()
	}
}

// certNames are the names by which a client may know the relay.
func certNames(name string, addr *net.TCPAddr) []string {
	names := []string{"localhost", "127.0.0.1", "::1", name}
	if !addr.IP.IsUnspecified() && !addr.IP.IsLoopback() {
		names = append(names, addr.IP.String())
	}
	if host, err := os.Hostname(); err == nil {
		names = append(names, host)
	}
	return names
}

// writeCertificate writes the certificate for clients to trust. Without a file that was asked for it tries a temporary one; a
// container may have no place for that, and the API has the certificate too.
func (r *Relay) writeCertificate() error {
	if r.cfg.TLS == "none" {
		return nil
	}
	if r.cfg.CertFile != "" {
		r.certFile = r.cfg.CertFile
		return os.WriteFile(r.certFile, r.certificate(), 0o644)
	}
	f, err := os.CreateTemp("", "smtprelay-*.pem")
	if err != nil {
		return nil
	}
	r.certFile, r.certTemp = f.Name(), true
	_, err = f.Write(r.certificate())
	return errors.Join(err, f.Close())
}

// certificate returns the relay's certificate as PEM, or nil without TLS.
func (r *Relay) certificate() []byte {
	if r.smtp.Certificate() == nil {
		return nil
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.smtp.Certificate().Raw})
}

func (r *Relay) startWeb(l *net.TCPListener) {
	ctx, cancel := context.WithCancel(context.Background())
	r.stopWeb = cancel
	r.guard = guard.New(l, r.cfg.Token, pages)
	r.web = r.guard.Server(ctx, r.routes())
	go func() { // until Close
		r.web.Serve(l)
		close(r.webEnded)
	}()
}

// Close ends the relay in order: SMTP first, as smtptest.Server.Close says, so that what still arrives can be seen to.
func (r *Relay) Close() {
	r.smtp.Close()
	r.stopWeb()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if r.web.Shutdown(ctx) != nil {
		r.web.Close()
	}
	<-r.webEnded
	if r.certTemp {
		os.Remove(r.certFile)
	}
}

// SMTPURL returns the relay's address in the form that smtprelay.ParseURL reads.
func (r *Relay) SMTPURL() string {
	u := url.URL{Scheme: map[string]string{"none": "smtp+insecure", "starttls": "smtp", "implicit": "smtps"}[r.cfg.TLS], Host: guard.Reachable(r.smtp.Addr())}
	if r.cfg.Username != "" {
		u.User = url.UserPassword(r.cfg.Username, r.cfg.Password)
	}
	if r.certFile != "" {
		u.RawQuery = url.Values{"ca": {r.certFile}}.Encode()
	}
	return u.String()
}

// PageURL returns the address of the page. With a token it is a link that opens the page once.
func (r *Relay) PageURL() string {
	return r.guard.URL(r.webAddr)
}

// Token returns what users of the page and the API must know, or "".
func (r *Relay) Token() string { return r.guard.Token() }
