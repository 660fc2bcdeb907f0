package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/smtprelay/smtprelay"
)

// A problem is what is wrong and what to change, in the words of somebody who sets a URL.
type problem struct {
	Step   string `json:"step"`
	What   string `json:"what"`
	Change string `json:"change"`
	Error  string `json:"error,omitempty"` // the library's
}

func resolveProblem(host string, err error) *problem {
	p := &problem{Step: "resolve", Error: err.Error()}
	dns, _ := errors.AsType[*net.DNSError](err)
	switch {
	case dns != nil && dns.IsNotFound:
		p.What = fmt.Sprintf("There is no host %q.", host)
		p.Change = "Look for a typing error in the host of the relay's URL. If the name is right, this machine may use the wrong name server."
	default:
		p.What = fmt.Sprintf("The name %q could not be looked up: %v.", host, err)
		p.Change = "Check that this machine (or container) has a network and a name server: /etc/resolv.conf."
	}
	return p
}

// shortCause is why a step without a reply has failed, without what to do about it.
func shortCause(e *smtprelay.Error) string {
	switch {
	case errors.Is(e.Err, syscall.ECONNREFUSED):
		return "connection refused"
	case isTimeout(e.Err):
		return "no answer in time"
	}
	text, _, _ := strings.Cut(e.Err.Error(), "; ")
	return printable(text)
}

func isTimeout(err error) bool {
	n, ok := errors.AsType[net.Error](err)
	return ok && n.Timeout() || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded)
}

// exit is the exit status that says where the probe has failed.
func (p *probe) exit() int {
	e, ok := errors.AsType[*smtprelay.Error](p.err)
	switch {
	case !ok:
		return 1
	case p.plain, p.tls:
		return exitTLS
	}
	switch e.Op {
	case smtprelay.OpConfig:
		return exitUsage
	case smtprelay.OpTLS, smtprelay.OpSTARTTLS:
		return exitTLS
	case smtprelay.OpAuth:
		return exitAuth
	case smtprelay.OpCheck:
		return exitRefused
	case smtprelay.OpMail, smtprelay.OpRcpt, smtprelay.OpData, smtprelay.OpEnd:
		if e.Reply.Code != 0 {
			return exitRefused
		}
	}
	return exitReach
}

// problem says what is wrong where the probe has failed.
func (p *probe) problem() *problem {
	e, ok := errors.AsType[*smtprelay.Error](p.err)
	if !ok {
		return &problem{What: p.err.Error(), Change: "Look at the error."}
	}
	host, port, _ := net.SplitHostPort(p.cfg.Addr)
	about := &problem{Step: string(e.Op), Error: e.Error()}
	said := ""
	if e.Reply.Code != 0 {
		said = e.Reply.String()
	}
	if p.plain {
		about.Step = string(smtprelay.OpTLS)
		about.What = fmt.Sprintf("Port %s does not speak TLS from the first byte, and the relay's URL says that it does.", port)
		about.Change = "Begin the relay's URL with smtp://, and keep the port: STARTTLS is then used."
		return about
	}
	switch e.Op {
	case smtprelay.OpDial, smtprelay.OpWait:
		about.dial(e, host, port)
	case smtprelay.OpGreeting:
		p.greeting(about, e, host, port, said)
	case smtprelay.OpEHLO:
		about.What = "The relay refuses the name by which this machine greets it: " + said + "."
		about.Change = "Add ?local_name=HOST to the relay's URL, with the full name of this machine in DNS."
		if said == "" {
			about.What = "The relay has greeted, and does not answer EHLO: " + shortCause(e) + "."
			about.Change = "Try again. If it is always so: the relay may refuse this machine's name (?local_name=HOST sets another) or its address; ask its operator."
		}
	case smtprelay.OpSTARTTLS:
		about.What = fmt.Sprintf("The relay does not offer STARTTLS on port %s, and mail and password would cross the network in the clear; nothing was sent.", port)
		about.Change = "If the relay has a port with TLS from the first byte, use it: smtps:// and port 465.\n" +
			"Else ask its operator for TLS. Within a network that you trust, smtp+insecure:// goes without."
		if said != "" {
			about.What = "The relay offers STARTTLS and then refuses it: " + said + "."
			about.Change = "Try smtps:// and port 465. Else ask the relay's operator."
		}
	case smtprelay.OpTLS:
		p.handshake(about, e, host, port)
	case smtprelay.OpAuth:
		p.auth(about, e, host, said)
	default:
		about.envelope(e, said, p.cfg.Username, p.offers("AUTH"))
	}
	return about
}

func (about *problem) dial(e *smtprelay.Error, host, port string) {
	switch {
	case errors.Is(e.Err, syscall.ECONNREFUSED):
		about.What = fmt.Sprintf("Nothing listens on port %s of %s.", port, host)
		about.Change = "Check the port in the relay's URL: relays listen on 587 (smtp://), on 465 (smtps://) and, within a network, on 25 (smtp+insecure://).\n" +
			"If the port is right, the relay is not running, or it listens on another address."
	case isTimeout(e.Err):
		about.What = fmt.Sprintf("%s does not answer on port %s.", host, port)
		about.Change = "A firewall on the way drops the connection, or the host is down. Many clouds and providers block port 25: use 587 (smtp://) or 465 (smtps://)."
	default:
		about.What = fmt.Sprintf("%s could not be reached on port %s: %s.", host, port, shortCause(e))
		about.Change = "Check host and port in the relay's URL, and that this machine (or container) has a way to the relay."
	}
}

func (p *probe) greeting(about *problem, e *smtprelay.Error, host, port, said string) {
	switch {
	case said != "":
		about.What = "The relay does not take this connection: " + said + "."
		about.Change = "The relay says so itself: its words tell why. It may take no mail from this machine's address, or too many connections are open already."
	case p.tls:
		about.What = fmt.Sprintf("Port %s speaks TLS from the first byte, and the relay's URL says that it does not.", port)
		about.Change = "Begin the relay's URL with smtps://, and keep the port."
	case isTimeout(e.Err):
		about.What = fmt.Sprintf("Something accepts connections on port %s of %s and says nothing.", port, host)
		about.Change = "Check the port. A relay that is overloaded or looks this machine up in DNS may take long: ?greeting_timeout=1m waits longer."
	case errors.Is(e.Err, io.EOF) || errors.Is(e.Err, syscall.ECONNRESET):
		about.What = fmt.Sprintf("Port %s of %s accepts the connection and closes it without a greeting.", port, host)
		about.Change = "Check host and port in the relay's URL: relays listen on 587 (smtp://) and 465 (smtps://).\n" +
			"If they are right, the relay, or a firewall before it, may take no connections from this machine's address."
	default:
		about.What = fmt.Sprintf("What answers on port %s of %s is no relay: %s.", port, host, shortCause(e))
		about.Change = "Check host and port in the relay's URL: relays listen on 587 (smtp://) and 465 (smtps://)."
	}
}

// speaksTLS reports whether TLS begins with the first byte.
func (p *probe) speaksTLS(ctx context.Context) bool {
	if p.cfg.TLS == smtprelay.TLSImplicit {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	// It is only asked whether there is TLS: nothing is sent, and whoever answers need not be trusted.
	d := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}}
	nc, err := d.DialContext(ctx, "tcp", p.report.Address)
	if err != nil {
		return false
	}
	nc.Close()
	return true
}

func (p *probe) handshake(about *problem, e *smtprelay.Error, host, port string) {
	_, isHeader := errors.AsType[tls.RecordHeaderError](e.Err)
	name, isName := errors.AsType[x509.HostnameError](e.Err)
	invalid, isInvalid := errors.AsType[x509.CertificateInvalidError](e.Err)
	unknown, isUnknown := errors.AsType[x509.UnknownAuthorityError](e.Err)
	switch {
	case isHeader:
		about.What = fmt.Sprintf("What answers on port %s of %s speaks no TLS.", port, host)
		about.Change = "Check host and port in the relay's URL: relays listen on 465 (smtps://) and 587 (smtp://)."
	case isName:
		names := append([]string(nil), name.Certificate.DNSNames...)
		for _, ip := range name.Certificate.IPAddresses {
			names = append(names, ip.String())
		}
		about.What = fmt.Sprintf("The certificate is not for %q. It is for %s.", name.Host, printable(cmp.Or(strings.Join(names, ", "), "no name at all")))
		about.Change = "Write the name that the certificate is for as the host of the relay's URL. If you have to connect by another name, and the\n" +
			"relay's operator confirms the name in the certificate, add ?server_name=NAME. If neither fits, somebody else is answering."
	case isInvalid && invalid.Reason == x509.Expired:
		now := time.Now()
		if now.Before(invalid.Cert.NotBefore) {
			about.What = fmt.Sprintf("The certificate is not valid before %s.", invalid.Cert.NotBefore.UTC().Format(time.RFC1123))
		} else {
			about.What = fmt.Sprintf("The certificate has expired, on %s.", invalid.Cert.NotAfter.UTC().Format(time.RFC1123))
		}
		about.Change = "The relay's operator has to renew it. If that was done, check the clock of this machine: it says " + now.UTC().Format(time.RFC1123) + "."
	case isUnknown && unknown.Cert != nil && unknown.Cert.Issuer.String() == unknown.Cert.Subject.String():
		about.What = "The certificate is self-signed: no authority that this machine trusts vouches for it."
		starttls := " -starttls smtp"
		if tlsWords(p.cfg) == tlsImplicit {
			starttls = ""
		}
		about.Change = "Ask the relay's operator whether its certificate has this SHA-256 fingerprint:\n" +
			fmt.Sprintf("  % X\n", sha256.Sum256(unknown.Cert.Raw)) +
			"If not, somebody else is answering in the relay's place. If so, save the certificate, and add ?ca=relay.pem to the relay's URL:\n" +
			fmt.Sprintf("  openssl s_client -connect %s%s </dev/null | openssl x509 >relay.pem", net.JoinHostPort(host, port), starttls)
	case isUnknown:
		about.What = "The certificate comes from an authority that this machine does not trust."
		if unknown.Cert != nil {
			about.What = fmt.Sprintf("The certificate comes from %s, an authority that this machine does not trust.", printable(unknown.Cert.Issuer.String()))
		}
		about.Change = "If the relay is one of the internet, this machine (or container) may lack the package ca-certificates.\n" +
			"If it is your own, add its authority's certificate by ?ca=FILE to the relay's URL."
	case isTimeout(e.Err):
		about.What = "The TLS handshake was not answered."
		about.Change = "A firewall or a proxy on the way may hold it up. Check the port, or try another: 465 (smtps://) or 587 (smtp://)."
	default:
		about.What = "TLS failed: " + shortCause(e) + "."
		about.Change = "The relay and this program found nothing in common, or the relay wants a client certificate. Ask its operator which\nversions of TLS it speaks: this program wants TLS 1.2 or later."
	}
}

// greets reports whether a relay greets in the clear at the probe's address.
func (p *probe) greets() bool {
	nc, err := net.DialTimeout("tcp", p.report.Address, 5*time.Second)
	if err != nil {
		return false
	}
	defer nc.Close()
	_ = nc.SetReadDeadline(time.Now().Add(5 * time.Second))
	greeting := make([]byte, 3)
	n, _ := nc.Read(greeting)
	return n == 3 && string(greeting) == "220"
}

func (p *probe) auth(about *problem, e *smtprelay.Error, host, said string) {
	switch {
	case e.Reply.Code == 535 || e.Reply.Code/100 == 5 && e.Reply.Code != 530 && e.Reply.Code != 538 && e.Reply.Code != 534 && e.Reply.Code != 502 && e.Reply.Code != 504:
		about.What = fmt.Sprintf("The relay does not accept user name and password (user %q): %s.", p.cfg.Username, said)
		about.Change = passwordAdvice(host) + "\n" +
			"Check that the password is complete, and that characters such as @ / : % # are percent-encoded in the URL (%40 %2F %3A %25 %23).\n" +
			"Do not try again and again: some relays lock the account."
	case e.Reply.Code == 534:
		about.What = "The relay does not take the account's password from a program: " + said + "."
		about.Change = "Make an app password for this program in the account's settings, or use OAuth, which needs Config.Auth in a program of your own."
	case e.Reply.Code == 530, e.Reply.Code == 538:
		about.What = "The relay wants TLS before it takes a password: " + said + "."
		about.Change = "Write smtp:// (STARTTLS) or smtps:// (port 465) in the relay's URL."
	case e.Reply.Code == 502, e.Reply.Code == 504:
		about.What = "The relay does not take a password by the mechanisms that it offers: " + said + "."
		about.Change = "It may want OAuth or another mechanism, which needs Config.Auth in a program of your own."
	case e.Reply.Code/100 == 4:
		about.What = "The relay cannot check user name and password now: " + said + "."
		about.Change = "Nothing: try again later."
	case p.state == nil && p.offers("STARTTLS"):
		about.What = "The relay takes a login only after STARTTLS, and the relay's URL says that there is no TLS. The password was not sent."
		about.Change = "Begin the relay's URL with smtp:// in place of smtp+insecure://."
	default:
		about.What = "The relay was not given the password: " + shortCause(e) + "."
		about.Change = "Port 25 often takes no login: use port 587 (smtp://) or 465 (smtps://). Where the relay needs no login, take user and\n" +
			"password out of the URL."
	}
}

// passwordAdvice says what well-known relays want as user and password.
func passwordAdvice(host string) string {
	host = strings.ToLower(host)
	for _, r := range []struct{ host, advice string }{
		{"sendgrid.net", `SendGrid: the user is the word "apikey", and the password an API key with the permission Mail Send.`},
		{"amazonaws.com", "Amazon SES: the password is the SMTP password made in the SES console, not the secret access key; each region has its own."},
		{"gmail.com", "Gmail: the password is an app password (16 letters), which needs 2-step verification; not that of the account."},
		{"mailgun.org", "Mailgun: the user is a whole address such as postmaster@your-domain; EU accounts have smtp.eu.mailgun.org."},
		{"postmarkapp.com", "Postmark: the server's API token is both user and password."},
		{"office365.com", "Microsoft 365 wants OAuth, or SMTP AUTH switched on for the mailbox."},
		{"outlook.com", "Microsoft 365 wants OAuth, or SMTP AUTH switched on for the mailbox."},
	} {
		if host == r.host || strings.HasSuffix(host, "."+r.host) {
			return r.advice
		}
	}
	return "Check user name and password at the relay's operator: is the user a whole address or a bare name?"
}

// wantsLogin is what relays say to those whom they do not know.
var wantsLogin = regexp.MustCompile(`(?i)relay|authent|log ?in|access denied`)

func (about *problem) envelope(e *smtprelay.Error, said, user string, auth bool) {
	switch {
	case e.Op == smtprelay.OpCheck:
		about.What = "The mail cannot be sent by this relay: " + shortCause(e) + "."
		about.Change = "Use another address."
		return
	case e.Reply.Code == 0:
		about.What = fmt.Sprintf("The relay gave no reply to %s: %s.", e.Op.Text(), shortCause(e))
		about.Change = "Try again. If it is always so, ask the relay's operator what is in its log at this time: " + time.Now().UTC().Format(time.RFC1123) + "."
		return
	}
	login := e.Reply.Code == 530 || wantsLogin.MatchString(e.Reply.Message)
	switch e.Op {
	case smtprelay.OpMail:
		about.What = "The relay refuses the sender: " + said + "."
		about.Change = "Use a sender that the relay knows as yours: most relays want its domain or address verified first."
	case smtprelay.OpRcpt:
		about.What = "The relay refuses the recipient: " + said + "."
		about.Change = "Check the address for typing errors. If it is right, the recipient's relay does not know it, or does not take mail from you: its words tell."
	default:
		about.What = "The relay refuses the message: " + said + "."
		about.Change = "The relay says so itself: its words tell why."
	}
	if login && user != "" {
		about.Change = fmt.Sprintf("The relay knows %q, and does not let it send to others, or not from this sender: ask the relay's operator what the\n"+
			"account may do, and use a sender that belongs to it.", user)
	} else if user == "" && auth && e.Reply.Code/100 == 5 {
		about.Change = "The relay offers a login, and the relay's URL has none: put user and password into it.\nIf the relay takes mail without a login: " +
			strings.ToLower(about.Change[:1]) + about.Change[1:]
	} else if login {
		about.Change = "The relay wants a login, or does not know you as somebody who may send to others: put user and password into the\n" +
			"relay's URL, or have this machine's address allowed at the relay."
	}
	if e.Reply.Code/100 == 4 {
		about.Change = "This is for now: the relay may take it later (greylisting, a full mailbox, a limit). Try again in some minutes."
	}
}
