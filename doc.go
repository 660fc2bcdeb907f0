// Package smtprelay sends mail through a relay such as SendGrid, Amazon SES or a Postfix on the local network.
//
//	client, err := smtprelay.New(smtprelay.Config{Password: os.Getenv("SENDGRID_API_KEY")})
//	if err != nil { … }
//	defer client.Close()
//	receipt, err := client.Send(ctx, smtprelay.Message{
//		From: "shop@example.com",
//		To:   []string{"ann@example.org"},
//		Body: smtprelay.Bytes(rfc5322),
//	})
//
// One [Client] serves a whole program and is safe for concurrent use. It keeps a pool of authenticated connections, never
// more than the relay allows (10 connections, 100 messages on each, if nothing else is said), and overlaps messages on
// them, so that a busy connection spends one round trip on a message.
//
// # Security
//
// Mail and credentials cross only a TLS connection whose certificate was verified for the name that was dialled. There is
// no silent fall-back to clear text: mail goes without TLS to relays on a loopback address, and where [TLSNone] or [TLSOpportunistic]
// says so; credentials only to a loopback address, whatever the mode, unless Config.AllowInsecureAuth says so. The password is in no
// error, log line or dump. Package smtp, which stands in for net/smtp, is as opportunistic as that is.
//
// # Outcomes
//
// Every [Client.Send] ends in one of three ways. A nil error means that the relay has accepted the message for every
// recipient. Otherwise the error is an [*Error] whose Outcome says whether the message was accepted for some
// ([Accepted]), for nobody ([NotAccepted]: it is safe to send again), or whether nobody can know ([Unknown]: the connection
// was lost between the final dot and its reply, so that sending again may deliver twice). The library itself tries again
// only where nothing can have been accepted.
//
// A queue asks [ShouldRetry] whether to keep a message, or [RetryTo] for whom: whoever has the message, may have it or was refused
// for good is not named. Error.Scope says whose fault it was, and Error.Op at which step.
//
// # Standards
//
// RFC 5321 (SMTP), 2920 (PIPELINING), 3030 (CHUNKING), 3207 (STARTTLS), 8314 (implicit TLS), 4954 (AUTH), 4616 (PLAIN),
// 1870 (SIZE), 6152 (8BITMIME), 6531 (SMTPUTF8), 3461 (DSN), 2034 and 3463 (enhanced status codes), 8689 (REQUIRETLS),
// 9422 (LIMITS), 2852 (DELIVERBY), 6710 (MT-PRIORITY), 7293 (RRVS).
package smtprelay
