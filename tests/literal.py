"""A second, literal implementation of one iteration, written from the paper and unoptimised on purpose.

Whole rollouts for every sample, one network call a question, no shared forward pass. It shares no code with the
package; it reads the same draws.
"""
import torch

SHIFT = 3.0


def network_velocity(network, x, sigma, fields, anchor_sigma=None):
    if hasattr(network, 'anchor_embedding'):
        network.anchor_embedding.sigma = anchor_sigma
    return network(x, encoder_hidden_states=fields['encoder_hidden_states'],
                   pooled_projections=fields['pooled_projections'], timestep=sigma * 1000.0).sample


def denoise(network, x, sigma, fields, anchor_sigma=None):
    return x - sigma[:, None, None, None] * network_velocity(network, x, sigma, fields, anchor_sigma)


def noised(x0, noise, sigma):
    s = sigma[:, None, None, None]
    return (1 - s) * x0 + s * noise


def regression(x0, delta, reference, min_norm=0.1):
    total = 0
    for b in range(len(x0)):
        norm = max((reference[b] - x0[b].detach()).abs().mean().item(), min_norm)
        target = (x0[b] + delta[b] / norm).detach()
        total = total + ((x0[b] - target) ** 2).mean()
    return total / len(x0)


def anchors_by_full_rollout(student, draws, fields):
    """The whole trajectory of every sample; the anchor is looked up in it afterwards."""
    trajectory, x = [], draws.noise
    with torch.no_grad():
        for i, sigma in enumerate(draws.sigmas):
            trajectory.append(x)
            if i + 1 < len(draws.sigmas):
                level = sigma.expand(len(x))
                velocity = network_velocity(student, x, level, fields)
                if draws.step_noise:  # x0 is noised anew, of those that go on: the first of the order
                    moving = [int(b) for b in draws.order if draws.anchor[b] > i]
                    noise = torch.zeros_like(x)
                    if moving:
                        noise[moving] = draws.step_noise[i]
                    x = noised(x - sigma * velocity, noise, draws.sigmas[i + 1].expand(len(x)))
                else:
                    x = x + (draws.sigmas[i + 1] - sigma) * velocity
    x_n = torch.stack([trajectory[n][b] for b, n in enumerate(draws.anchor)])
    sigma_n = torch.stack([draws.sigmas[n] for n in draws.anchor])
    return x_n, sigma_n


def fake_loss(networks, draws, fields, step=0):
    x_n, sigma_n = anchors_by_full_rollout(networks['student'], draws, fields)
    with torch.no_grad():
        x0 = denoise(networks['student'], x_n, sigma_n, fields)
    sigma, noise = draws.fake_sigma[step], draws.fake_noise[step]
    z = noised(x0, noise, sigma)
    velocity = network_velocity(networks['fake'], z, sigma, fields, sigma_n)
    return ((velocity - (noise - x0)) ** 2).mean()


def student_losses(networks, draws, fields, null_fields, alpha, guided):
    """Losses by name, for the terms that the draws hold; `guided` names those with guidance in the real score."""
    student, teacher, fake = networks['student'], networks['teacher'], networks['fake']
    x_n, sigma_n = anchors_by_full_rollout(student, draws, fields)
    losses = {}
    if 'ca' in draws.losses:
        d = draws.losses['ca']
        x0 = denoise(student, x_n, sigma_n, fields)
        with torch.no_grad():
            z = noised(x0, d['noise'], d['sigma'])
            cond, null = denoise(teacher, z, d['sigma'], fields), denoise(teacher, z, d['sigma'], null_fields)
        losses['ca'] = regression(x0, alpha * (cond - null), cond)
    for name in ('dm', 'cdm'):
        if name not in draws.losses:
            continue
        d, x, sigma = draws.losses[name], x_n, sigma_n
        if 'point_sigma' in d:  # the CDM loss, unless it stays on the trajectory
            sigma = d['point_sigma']
            with torch.no_grad():
                v_n = network_velocity(student, x_n, sigma_n, fields)
            x = x_n + (sigma - sigma_n)[:, None, None, None] * v_n
            if 'point_noise' in d:
                x = noised(x_n - sigma_n[:, None, None, None] * v_n, d['point_noise'], sigma)
        x0 = denoise(student, x, sigma, fields)
        with torch.no_grad():
            z = noised(x0, d['noise'], d['sigma'])
            cond = real = denoise(teacher, z, d['sigma'], fields)
            if name in guided:
                real = real + alpha * (real - denoise(teacher, z, d['sigma'], null_fields))
            delta = real - denoise(fake, z, d['sigma'], fields, sigma)
        # DMD2's real score is guided as a whole; the CDM loss is CA's kin, which measures against the unguided teacher.
        losses[name] = regression(x0, delta, real if name == 'dm' else cond)
    return losses


def tdm_point(x_n, sigma_n, student, fields, end, tau, noise):
    """TDM (arXiv 2503.06674) sample by sample, in signal and noise levels (1 - t, t): the student's step from sigma_n
    to `end` without new noise, as in DDIM, then the Markov forward process up to tau. Returns x0, the point, and the
    noise that is mixed into it."""
    v = network_velocity(student, x_n, sigma_n, fields)
    points, mixed, clean = [], [], []
    for b in range(len(x_n)):
        t, s, u = float(sigma_n[b]), float(end[b]), float(tau[b])
        x0 = x_n[b] - t * v[b]
        eps = (x_n[b] - (1 - t) * x0) / t
        at_end = (1 - s) * x0 + s * eps
        keep = (1 - u) / (1 - s)
        added = (u**2 - (keep * s)**2)**0.5
        points.append(keep * at_end + added * noise[b])
        mixed.append((keep * s * eps + added * noise[b]) / u)
        clean.append(x0)
    return torch.stack(clean), torch.stack(points), torch.stack(mixed)


def step_ends(draws):
    levels = [float(s) for s in draws.sigmas] + [0.0]
    # With x0 noised anew at the step's end, nothing but x0 goes on from the anchor.
    return [0.0 if draws.step_noise else levels[int(n) + 1] for n in draws.anchor]


def tdm_fake_loss(networks, draws, fields, step=0):
    """The fake score's regression onto the student's x0 at the point, in velocity as flow matching weighs it, times the
    ratio of the Gaussian densities of mixed and fresh noise, per dimension."""
    x_n, sigma_n = anchors_by_full_rollout(networks['student'], draws, fields)
    tau, noise, total = draws.fake_sigma[step], draws.fake_noise[step], 0
    with torch.no_grad():
        x0, z, mixed = tdm_point(x_n, sigma_n, networks['student'], fields, step_ends(draws), tau, noise)
    estimate = denoise(networks['fake'], z, tau, fields, sigma_n)
    for b in range(len(z)):
        ratio = torch.exp(-0.5 * (mixed[b]**2).mean()) / torch.exp(-0.5 * (noise[b]**2).mean())
        total = total + ratio * ((estimate[b] - x0[b])**2).mean() / tau[b]**2
    return total / len(z)


def tdm_loss(networks, draws, fields, null_fields, alpha, c=1e-3, min_norm=0.1):
    """The student's loss: pseudo-Huber distance, element by element, to its x0 moved by guided real - fake score."""
    teacher, fake, d = networks['teacher'], networks['fake'], draws.losses['dm']
    x_n, sigma_n = anchors_by_full_rollout(networks['student'], draws, fields)
    x0, z, _ = tdm_point(x_n, sigma_n, networks['student'], fields, step_ends(draws), d['sigma'], d['noise'])
    with torch.no_grad():
        z = z.detach()
        cond, null = denoise(teacher, z, d['sigma'], fields), denoise(teacher, z, d['sigma'], null_fields)
        guided = cond + alpha * (cond - null)
        target = x0.detach() + (cond - denoise(fake, z, d['sigma'], fields, sigma_n)) + alpha * (cond - null)
    total = 0
    for b in range(len(x0)):
        norm = max((x0[b].detach() - guided[b]).abs().mean().item(), min_norm)
        total = total + ((((x0[b] - target[b])**2 + c**2).sqrt() - c) / norm).mean()
    return total / len(x0)


def merge(fake, student, rate):
    student = dict(student.named_parameters())
    with torch.no_grad():
        for name, parameter in fake.named_parameters():
            if name in student:
                parameter.copy_((1 - rate) * parameter + rate * student[name])
